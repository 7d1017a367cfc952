"""A hand-made card: embed -> two blocks (the second returns a tuple) -> head; hidden 8, vocabulary 50."""

from pellucid_shared.card import Call, Fields, ModelCard, ModuleInfo, OpaqueLeaf, Sequence, TensorLeaf

HIDDEN, VOCAB = 8, 50
_STATE = ("batch", "tokens", HIDDEN)


def state(number: int) -> TensorLeaf:
    return TensorLeaf(shape=_STATE, dtype="float32", object=number)


def hand_card(name: str = "m", *, packs: bool = True) -> ModelCard:
    """The card of a model that does not exist; object 1 is h.0's output and h.1's input, as in a real one."""
    ids = TensorLeaf(shape=("batch", "tokens"), dtype="int64", object=0)
    logits = TensorLeaf(shape=("batch", "tokens", VOCAB), dtype="float32", object=4)
    mask = TensorLeaf(shape=None, dtype="bool", object=9)
    pair = Sequence(leaf="tuple", items=(state(3), OpaqueLeaf(class_name="DynamicCache")))
    weight = {"weight": TensorLeaf(shape=(VOCAB, HIDDEN), dtype="float32")}
    return ModelCard(
        id=name,
        source="nowhere",
        class_name="HandForCausalLM",
        base_model_prefix="",
        fingerprint="0" * 64,
        dtype="float32",
        parameters=VOCAB * HIDDEN * 2,
        vocab_size=VOCAB,
        max_tokens=64,
        packs=packs,
        has_tokenizer=True,
        modules=(
            ModuleInfo(path="", class_name="HandForCausalLM"),
            ModuleInfo(path="embed", class_name="Embedding", parameters=weight),
            ModuleInfo(path="h", class_name="ModuleList"),
            ModuleInfo(path="h.0", class_name="Block"),
            ModuleInfo(path="h.1", class_name="Block"),
            ModuleInfo(path="unused", class_name="Linear"),
            ModuleInfo(path="lm_head", class_name="Linear", parameters=weight),
        ),
        prefill=(
            Call(
                module="",
                call=0,
                enter=0,
                exit=9,
                args=(),
                kwargs={"input_ids": ids},
                output=Fields(class_name="CausalLMOutputWithPast", items={"logits": logits}),
            ),
            Call(module="embed", call=0, enter=1, exit=2, args=(ids,), kwargs={}, output=state(1)),
            Call(
                module="h.0",
                call=0,
                enter=3,
                exit=4,
                args=(state(1),),
                kwargs={"mask": mask},
                output=state(2),
            ),
            Call(module="h.1", call=0, enter=5, exit=6, args=(state(2),), kwargs={}, output=pair),
            Call(module="lm_head", call=0, enter=7, exit=8, args=(state(3),), kwargs={}, output=logits),
        ),
    )
