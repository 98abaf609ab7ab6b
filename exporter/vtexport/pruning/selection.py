"""Plans that only choose: a language model elsewhere then gets the embeddings of the chosen visual tokens."""

from __future__ import annotations

from dataclasses import replace

from vtexport.errors import InputError
from vtexport.pruning.plan import PruningPlan, Stage, token_budget


def selection_plan(plan: PruningPlan) -> PruningPlan:
    """The plan with one decoder stage, whose chosen tokens a language model elsewhere sees in all of its layers.

    That stage stands where the first of `plan` does. It keeps round(keep * V) of the V visual tokens before any
    pruning, so that `keep` means what it always does: the mean over the decoder's layers, which here all see the same
    tokens. The stages of `plan` itself keep fewer, because the layers before them see more. Nothing is merged, because
    a merged token has no embedding. A vision stage stays as it is: it leaves `vision_keep` of the V tokens, and the
    decoder stage chooses the same round(keep * V) among those. Where tokens get their RoPE positions has no effect;
    that language model numbers the tokens it is given.

    Raises:
        InputError: no decoder-stage method that rates tokens, or a keep ratio that leaves nothing to choose.
    """
    method = plan.methods.decoder
    if method is None:
        raise InputError(
            f"method {plan.method} chooses no visual token in the decoder; its vision engine alone does all, so build "
            "that, or give a decoder-stage method such as sparsevlm"
        )
    if not method.scores:
        raise InputError(
            f"method {method.name} does not rate visual tokens, so it cannot choose those for another language model; "
            "use one that does, such as sparsevlm"
        )
    entering, kept = plan.vision_tokens, token_budget(plan.num_visual_tokens, plan.keep)
    if kept >= entering:
        raise InputError(
            f"--keep {plan.keep:g} keeps all {entering} visual tokens that enter the decoder, so there is nothing to "
            "choose; give a smaller ratio"
        )
    layer = min(plan.decoder_stages)
    before = [stage for stage in plan.stages if stage.layer is None]
    return replace(
        plan,
        methods=replace(plan.methods, decoder=method.choosing(layer)),
        stages=(*before, Stage.decoder(layer, entering, kept)),
    )


def selecting_stage(plan: PruningPlan) -> Stage:
    """The one decoder stage of a plan that `selection_plan` made."""
    (stage,) = plan.decoder_stages.values()
    assert not stage.recycled, "a plan that only chooses merges nothing"
    return stage


def rating_layer(plan: PruningPlan) -> int:
    """The decoder layer whose attention rates in a plan that `selection_plan` made; only layers before it run whole."""
    layer, method = selecting_stage(plan).layer, plan.methods.decoder
    assert layer is not None
    assert method is not None
    return layer + 1 if method.attention_of == "next" else layer
