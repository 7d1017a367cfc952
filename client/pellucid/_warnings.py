"""Two habits that silently mean something else than they seem to: said once, with the line and the remedy."""

from __future__ import annotations

import warnings

from pellucid_shared.flat import Flat
from pellucid_shared.graph import GET, Node
from pellucid_shared.storage import Timeline
from pellucid_shared.values import Site

from ._recorder import Recorder


def warn_of_first_row(recorder: Recorder, node: int, line: str) -> None:
    """``output[0]`` on a block that returns a bare tensor is the first row of the batch, not a member."""
    made = recorder.nodes[node]
    if recorder.tuple_outputs or made.op != GET or made.site.kind != "output" or made.site.path:
        return
    path = made.site.module
    if path.rpartition(".")[2].isdigit():
        _warn(
            f"{path}.output is a tensor {recorder.show_spec(node)}, so [0] is the first row of the batch. "
            f"For all of it write {path}.output; for the row write {path}.output[0, :]",
            line,
        )


def warn_of_edits_that_show(recorder: Recorder, flat: Flat, found: Timeline) -> None:
    """A name saved before its site is edited in place comes back edited, as in PyTorch."""
    edits = [i for i, roots in enumerate(found.effects) if any(root[0] == "site" for root in roots)]
    for save in flat.saves if edits else ():
        saved_at = recorder.lines[flat.origin[save]]
        for read in flat.nodes[save].refs():
            roots = {root for root in found.roots[read] if root[0] == "site"}
            for edit in edits:
                edited_at = recorder.lines[flat.origin[edit]]
                shows = edit > save and roots & found.effects[edit] and not flat.exclude(save, edit)
                if shows and edited_at != saved_at:
                    _warn(
                        f"{_site(flat.nodes[read])} is saved here and edited in place at {edited_at}: what "
                        "comes back shows the edit. To keep the value from before it, save .clone() of it",
                        saved_at,
                    )
                    return


def _site(node: Node) -> str:
    first = node.args[0]
    return str(first) if isinstance(first, Site) else f"a view of a site ({node.op})"


def _warn(message: str, line: str) -> None:
    file, _, number = line.rpartition(":")
    warnings.warn_explicit(message, UserWarning, file or "pellucid", int(number) if number.isdigit() else 0)
