"""What needs the full weights on every GPU, which ZeRO stage 3 has only during their layer's call."""

from collections.abc import Iterator

from pcpo_fast.config.schema import Config


def needs_whole_weights(config: Config) -> Iterator[tuple[str, str]]:
    """What does not work in ZeRO stage 3, as "KEY: the reason", each with the setting that does.

    Automatic compilation is not among it: it stays off there.
    """
    whole = "needs the full weights on every GPU"
    if config.model.compile is True:
        yield f"model.compile: {whole}", "model.compile=false"
    if config.rollout.merge_lora:
        yield f"rollout.merge_lora: {whole}", "rollout.merge_lora=false"
    if config.model.gradient_checkpointing == "selective":  # its operations must be the same when they are repeated
        yield f"model.gradient_checkpointing: selective {whole}", "model.gradient_checkpointing=true"
    if config.rollout.candidates_in_fp8:
        yield f"rollout.candidate_weights: fp8 {whole}", "rollout.candidate_weights=full"
    if config.model.base_weights == "nf4":
        yield "model.base_weights: nf4 cannot be partitioned", "model.base_weights=full"
