"""`pellucid export`: an experiment's file as a script that needs no Pellucid."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pellucid_shared.errors import PellucidError

from ._cli_experiments import FILE
from ._cli_server import host_option, server

if TYPE_CHECKING:
    from ._target import Target


@click.command()
@click.argument("file", type=FILE)
@click.option("--hooks", is_flag=True, required=True, help="As plain PyTorch hooks over transformers.")
@click.option(
    "--source",
    help="Folder or hub id the script loads the model from. Without a server, it is loaded here as well, to "
    "see how it is built.",
)
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Where to write it; else print it."
)
@host_option
def export(file: Path, hooks: bool, source: str | None, out: Path | None, host: str | None) -> None:
    """Write an experiment's FILE as a standalone script that computes the same values.

    Where the model runs its modules is asked of a server, or, without one, of the model --source names. The
    script needs torch, transformers and safetensors. Tensors that the experiment names stay in the file
    beside it: keep the script in the same folder.
    """
    from ._config import config
    from ._export import hooks_script
    from ._files import load_experiment

    experiment = load_experiment(file)
    if host or (config.host and source is None):
        from ._remote import RemoteModel

        target: Target = RemoteModel(server(host), experiment.graph.model)
    elif source is not None:
        from ._local import LoadOptions, LocalModel

        target = LocalModel(experiment.graph.model, LoadOptions(source))
    else:
        raise click.ClickException(
            "give --source, the folder or hub id of the model, or name a server with PELLUCID_HOST or --host"
        )
    try:
        text = hooks_script(experiment, target, file, source)
    except PellucidError as error:
        error.where = f"{file}, node {error.node}" if error.node is not None else str(file)
        raise
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        out.write_text(text)
    except OSError as error:
        raise click.ClickException(f"{out} cannot be written: {error.strerror}") from None
