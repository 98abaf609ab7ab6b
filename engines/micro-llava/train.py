"""Train micro-llava, the LLaVA checkpoint that ships with vtexport.

Five stages, each resumable, from the root of the repository (about 100 minutes on two cores):

    python engines/micro-llava/train.py tower      # CLIP tower: what lies under each patch, what CLS saw
    python engines/micro-llava/train.py cls        # the same with the feature layer's CLS attention pooling patches
    python engines/micro-llava/train.py decoder    # projector and Llama on frozen features, background thinned
    python engines/micro-llava/train.py full       # the same on all 144 visual tokens, dense as it will be used
    python engines/micro-llava/train.py align      # embeddings of the question's content words near the image's
    python engines/micro-llava/train.py export     # the Hugging Face checkpoint, fp16 safetensors

The tower learns from labels of its own: digit and colour per patch and, on CLS, the set of coloured digits,
as CLIP's CLS learns what a caption names. With these alone, CLS gathers some digits in early layers, and the
feature layer's attention misses them (80 % of held-out digits are within the top 22 of 144 patches). So `cls`
adds attention-based multiple-instance learning (Ilse et al., 2018): the patches' own predictions, pooled by the
feature layer's head-mean CLS attention, must name every digit present; and patches must tell in which half of
the image they lie, which no other loss requires. The decoder learns from answers only. All questions about an
image share one sequence, but a mask keeps each question to the image and itself, at the positions it would
have alone: exactly the single-question prompt, at a fraction of the cost.

SparseVLM picks its text raters by the similarity of text and visual embeddings, which learning from answers does not
shape: after `full`, the raters of every question are its line break and its verb. `align` adds what LLaVA gets from
pre-training on captions: in the softmax over the text of visual · textᵀ, content words stand out evenly. No stage
trains on pruned or compacted sequences, so that pruning stays training-free.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vtexport.micro import scenes

HERE = Path(__file__).parent
WORK = HERE / "training"
PATCH = 8
PATCH_GRID = scenes.IMAGE_SIZE // PATCH
TOKENS = PATCH_GRID**2
FEATURE_LAYER = -2
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
PAIRS = 10 * len(scenes.COLOUR_NAMES)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over micro-llava's own sentences: any text has tokens, and known words have one each."""
    corpus = [
        "USER: \nwhat digit is red? ASSISTANT: 3",
        "\nhow many digits are there? ASSISTANT: top left bottom right and",
        "\nlist the digits. ASSISTANT:",
        "\nwhere is the digit? which which\nwhich in the image the colour is of has",
    ]
    corpus += [f"\nwhat colour is the {d}? where is the {d}? the {d}" for d in range(10)]
    corpus += [f"where is the {c} digit? what digit is {c}? {c}" for c in scenes.COLOUR_NAMES]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=1,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """CLIP preprocessing at 96 pixels and the prompt layout of LLaVA-1.5."""
    size = scenes.IMAGE_SIZE
    images = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=MEAN.tolist(),
        image_std=STD.tolist(),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=scenes.IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=TOKENS,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )


class Heads(nn.Module):
    """The tower's training heads: digit, colour and place of every patch, set of coloured digits on CLS."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.digit = nn.Linear(width, 11)
        self.colour = nn.Linear(width, len(scenes.COLOUR_NAMES) + 1)
        self.place = nn.Linear(width, 2)
        self.present = nn.Linear(width, PAIRS)
        self.present_last = nn.Linear(width, PAIRS)


def optimizers(modules: list[nn.Module], lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, norms, biases and heads."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            inside = ".layers." in f".{name}" and parameter.ndim == 2
            (matrices if inside else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=lr * 0.15, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def set_rate(opts: list[torch.optim.Optimizer], step: int, steps: int, tail: float) -> None:
    """Warm-up over 50 steps, then constant, then linear to zero over the last share `tail` of the steps."""
    factor = min(1.0, (step + 1) / 50)
    if tail:
        factor = min(factor, max(0.0, (steps - step) / (tail * steps)))
    for opt in opts:
        for group in opt.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * factor


def pixels(batch: list[scenes.Scene]) -> torch.Tensor:
    stacked = np.stack([scene.image for scene in batch]).astype(np.float32) / 255
    return torch.from_numpy(((stacked - MEAN) / STD).transpose(0, 3, 1, 2).copy())


def tower_step(
    model: Any, heads: Heads, batch: list[scenes.Scene], gather: bool
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of one batch; with `gather` also on places and on the feature layer's CLS attention."""
    values, colours = (torch.from_numpy(a) for a in scenes.patch_labels(batch, PATCH))
    present = torch.zeros(len(batch), PAIRS)
    for row, scene in enumerate(batch):
        for digit in scene.digits:
            present[row, digit.value * len(scenes.COLOUR_NAMES) + scenes.COLOUR_NAMES.index(digit.colour)] = 1
    tower = model.model.vision_tower
    with torch.autocast("cpu", torch.bfloat16):
        out = tower(pixels(batch), output_hidden_states=True, output_attentions=gather)
    feature = out.hidden_states[FEATURE_LAYER].float()
    patches, cls = feature[:, 1:], feature[:, 0]
    digit_logits, colour_logits = heads.digit(patches), heads.colour(patches)
    # Nine patches in ten are background: weight the foreground so that both count about the same.
    weight = torch.where(values < 10, 1.0, 0.15)
    digit_loss = F.cross_entropy(digit_logits.flatten(0, 1), values.flatten(), reduction="none")
    colour_loss = F.cross_entropy(colour_logits.flatten(0, 1), colours.flatten(), reduction="none")
    patch_loss = ((digit_loss + colour_loss) * weight.flatten()).sum() / weight.sum()
    emphasis = torch.full((PAIRS,), 8.0)
    cls_logits = heads.present(cls)
    cls_loss = F.binary_cross_entropy_with_logits(cls_logits, present, pos_weight=emphasis)
    last_loss = F.binary_cross_entropy_with_logits(
        heads.present_last(out.pooler_output.float()), present, pos_weight=emphasis
    )
    gather_loss = patch_loss.new_zeros(())
    if gather:
        half = torch.arange(PATCH_GRID) >= PATCH_GRID // 2
        low = half.repeat_interleave(PATCH_GRID).expand(len(batch), -1)
        right_half = half.repeat(PATCH_GRID).expand(len(batch), -1)
        place = torch.stack([low, right_half], dim=-1).float()
        place_loss = F.binary_cross_entropy_with_logits(
            heads.place(patches), place, weight=(weight / weight.mean())[..., None]
        )
        attention = out.attentions[FEATURE_LAYER][:, :, 0, 1:].float().mean(1)
        named = digit_logits.softmax(-1)[..., :10, None] * colour_logits.softmax(-1)[..., None, :-1]
        pooled = torch.einsum("bv,bvp->bp", attention, named.flatten(2).detach())
        # A digit's fair share of the attention is 1 / (digits present).
        share = pooled * present.sum(1, keepdim=True)
        gather_loss = -(present * torch.log(share + 1e-3)).sum() / present.sum() + 4 * place_loss
    front = values < 10
    with torch.no_grad():
        right = (digit_logits.argmax(-1) == values) & (colour_logits.argmax(-1) == colours)
        recalled = [
            set(logit.topk(int(truth.sum())).indices.tolist()) == set(truth.nonzero().flatten().tolist())
            for logit, truth in zip(cls_logits, present, strict=True)
        ]
    facts = {
        "patch": patch_loss.item(),
        "cls": cls_loss.item(),
        "last": last_loss.item(),
        "gather": gather_loss.item(),
        "front_acc": right[front].float().mean().item(),
        "back_acc": right[~front].float().mean().item(),
        "cls_exact": float(np.mean(recalled)),
    }
    loss = patch_loss + 4 * cls_loss + 2 * last_loss
    return loss + gather_loss, facts


class Packer:
    """Packs all questions about an image behind one prefix; the mask keeps the questions apart."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self.tokenizer = processor.tokenizer
        text = self.prompt("what digit is red?")
        ids = self.tokenizer(text)["input_ids"]
        at = ids.index(self.tokenizer.convert_tokens_to_ids("<image>"))
        self.prefix = ids[:at]
        after = self.tokenizer(self.prompt("is the are?"))["input_ids"]
        self.function_words = after[after.index(self.tokenizer.convert_tokens_to_ids("<image>")) + 1 :]
        self.function_words += self.tokenizer(" is the are", add_special_tokens=False)["input_ids"]
        self.cache: dict[str, tuple[list[int], list[int]]] = {}

    def prompt(self, question: str) -> str:
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], chat_template=CHAT_TEMPLATE, tokenize=False,
            add_generation_prompt=True,
        )  # fmt: skip
        return text

    def segment(self, question: scenes.Question) -> tuple[list[int], list[int]]:
        """(ids after the image, labels) of one question and its answer; labels are -100 on the question."""
        key = question.text + "|" + question.answer
        if key not in self.cache:
            image = self.tokenizer.convert_tokens_to_ids("<image>")
            ids = self.tokenizer(self.prompt(question.text))["input_ids"]
            head = ids[ids.index(image) + 1 :]
            tail = self.tokenizer(" " + question.answer, add_special_tokens=False)["input_ids"]
            tail = [*tail, self.tokenizer.eos_token_id]
            self.cache[key] = (head + tail, [-100] * len(head) + tail)
        return self.cache[key]

    def __call__(self, asked: list[list[scenes.Question]]) -> dict[str, torch.Tensor]:
        """Text ids, labels, segment numbers (0 = padding) and offsets inside each segment, all [B, L]."""
        rows = []
        for row in asked:
            ids: list[int] = []
            labels: list[int] = []
            segments: list[int] = []
            offsets: list[int] = []
            for number, question in enumerate(row, start=1):
                piece, target = self.segment(question)
                ids += piece
                labels += target
                segments += [number] * len(piece)
                offsets += range(len(piece))
            rows.append((ids, labels, segments, offsets))
        longest = max(len(row[0]) for row in rows)
        pads = (self.tokenizer.pad_token_id, -100, 0, 0)
        fields = [
            torch.tensor([row[field] + [pads[field]] * (longest - len(row[field])) for row in rows])
            for field in range(4)
        ]
        return dict(zip(("ids", "labels", "segments", "offsets"), fields, strict=True))


def decoder_loss(
    model: Any,
    packer: Packer,
    batch: list[scenes.Scene],
    asked: list[list[scenes.Question]],
    visible: int,
    align: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The answer loss, which answer tokens are right, and the targets; `visible` < 144 thins the background only."""
    language = model.model.language_model
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model.model.vision_tower(pixels(batch), output_hidden_states=True)
        feature = out.hidden_states[FEATURE_LAYER][:, 1:].float()
    rows = len(batch)
    place = torch.arange(TOKENS).expand(rows, -1)
    if visible < TOKENS:
        values, _ = scenes.patch_labels(batch, PATCH)
        order = torch.from_numpy(values < 10).float() + torch.rand(rows, TOKENS) * 0.5
        place = order.topk(visible, dim=1).indices.sort(dim=1).values
        feature = feature.gather(1, place[..., None].expand(-1, -1, feature.shape[-1]))
    text = packer(asked)
    prefix = torch.tensor(packer.prefix).expand(rows, -1)
    before = prefix.shape[1]
    with torch.autocast("cpu", torch.bfloat16):
        visual = model.model.multi_modal_projector(feature)
        embed = language.get_input_embeddings()
        hidden = torch.cat([embed(prefix), visual.to(embed.weight.dtype), embed(text["ids"])], dim=1)
        # Dropped background leaves holes: every token keeps its order and distance to the others. Random gaps
        # before and after the image (randomized positions, Ruoss et al., 2023) keep the decoder from inferring a
        # patch's row from its RoPE distance, which would differ for any other image size or prompt.
        ahead, behind = torch.randint(0, 512, (2, rows, 1))
        image = before + ahead
        positions = torch.cat(
            [
                torch.arange(before).expand(rows, -1),
                image + place,
                image + TOKENS + behind + text["offsets"],
            ],
            dim=1,
        )
        shared = before + visible
        segments = torch.cat([torch.zeros(rows, shared, dtype=torch.long), text["segments"]], dim=1)
        length = segments.shape[1]
        in_prefix = torch.arange(length) < shared
        same = segments[:, :, None] == segments[:, None, :]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & (in_prefix[None, None, :] | same)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
        states = language(
            inputs_embeds=hidden, attention_mask=mask[:, None], position_ids=positions, use_cache=False
        ).last_hidden_state[:, shared - 1 : -1]
        wanted = text["labels"] != -100
        logits = model.lm_head(states[wanted]).float()
    target = text["labels"][wanted]
    loss = F.cross_entropy(logits, target)
    if align:
        ours = (text["labels"] == -100) & (text["segments"] > 0)
        head = F.one_hot(text["segments"]).float()[..., 1:] * ours[..., None]
        function_words = torch.tensor(packer.function_words)
        content = ours & ~torch.isin(text["ids"], function_words)
        loss = loss + 0.3 * alignment_loss(visual.float(), embed(text["ids"]).float(), head, content)
    return loss, logits.argmax(-1) == target, target


def alignment_loss(
    visual: torch.Tensor, words: torch.Tensor, head: torch.Tensor, content: torch.Tensor
) -> torch.Tensor:
    """The divergence of the image's similarity to a question's tokens from an even one over its content words.

    Args:
        visual: [B, V, C] visual embeddings.
        words: [B, L, C] text embeddings.
        head: [B, L, n] float, whether a token belongs to the head of question n (before its answer).
        content: [B, L] bool, whether a token is a content word of its question.
    """
    logits = visual @ words.transpose(1, 2)
    weight = torch.exp(logits - logits.amax(dim=2, keepdim=True).detach()) * head.amax(dim=2)[:, None]
    total = (weight @ head + 1e-9) @ head.transpose(1, 2)
    share = (weight / total.clamp(min=1e-9)).mean(dim=1)
    counts = (content[..., None] * head).sum(dim=1, keepdim=True)
    number = (counts @ head.transpose(1, 2))[:, 0]
    # Cross-entropy with the even distribution over content words, for each question.
    return -(torch.log(share[content] + 1e-6) / number[content]).sum() / head.amax(dim=1).sum()


def save(stage: str, step: int, model: Any, heads: Heads, opts: list[torch.optim.Optimizer]) -> None:
    WORK.mkdir(exist_ok=True)
    state = {
        "step": step,
        "model": model.state_dict(),
        "heads": heads.state_dict(),
        "opts": [opt.state_dict() for opt in opts],
    }
    torch.save(state, WORK / f"{stage}.partial")
    (WORK / f"{stage}.partial").rename(WORK / f"{stage}.pt")


def start_projector(model: Any, heads: Heads) -> None:
    """Initialise the projector with read-outs of the tower, so that digits and places weigh as much as colours.

    From a random start, the decoder soon looks up digits by colour, but not colours by digit within 1,600 steps: the
    difference between digits is a small part of the features' norm, too small for a key.
    """
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        parts: list[tuple[torch.Tensor, torch.Tensor]] = [(h.weight, h.bias) for h in (heads.digit, heads.colour)]
        # gelu passes only one sign, and a place has two.
        parts += [(heads.place.weight, heads.place.bias), (-heads.place.weight, -heads.place.bias)]
        rows = sum(len(weight) for weight, _ in parts)
        projector.linear_1.weight[:rows] = torch.cat([weight for weight, _ in parts])
        projector.linear_1.bias[:rows] = torch.cat([bias for _, bias in parts])
        # Visual tokens must not dominate what the layers add to them.
        nn.init.orthogonal_(projector.linear_2.weight, gain=0.2)


def start_alignment(model: Any, packer: Packer) -> None:
    """Start `align` at a low loss: remove from text embeddings the few dimensions that visual tokens use.

    Visual tokens have norms of about 700 in about twenty dimensions, so that one arbitrary token decides a question's
    similarity to them. The rest of an embedding is neutral to the image; a step along the mean visual token, up for
    content words and down for function words, separates the two.
    """
    rng = np.random.default_rng([6, 0])
    batch = [scenes.compose(rng, "train") for _ in range(64)]
    with torch.no_grad():
        out = model.model.vision_tower(pixels(batch), output_hidden_states=True)
        visual = model.model.multi_modal_projector(out.hidden_states[FEATURE_LAYER][:, 1:]).flatten(0, 1)
        mean = visual.mean(dim=0)
        used = torch.linalg.svd(visual - mean, full_matrices=False).Vh[:20]
        basis = torch.linalg.qr(torch.cat([used, mean[None]]).T).Q
        weight = model.get_input_embeddings().weight
        weight -= weight @ basis @ basis.T
        sign = torch.ones(len(weight), 1)
        sign[packer.function_words] = -1
        weight += 1.5 * sign * mean / mean.square().sum()


def train(stage: str, steps: int, batch_size: int, lr: float, visible: int, max_digits_from: int) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    model: Any = LlavaForConditionalGeneration(build_config(tokenizer))
    # On CPUs the backward pass of fused attention is the slowest part of a step at this size.
    model.set_attn_implementation("eager")
    heads = Heads(128)
    before = {"tower": None, "cls": "tower", "decoder": "cls", "full": "decoder", "align": "full"}[stage]
    if before is not None:
        loaded = torch.load(WORK / f"{before}.pt", weights_only=True)
        model.load_state_dict(loaded["model"])
        heads.load_state_dict(loaded["heads"])
    if stage == "decoder":
        start_projector(model, heads)
    tower = stage in ("tower", "cls")
    model.model.vision_tower.requires_grad_(tower)
    trained = (
        [model.model.vision_tower, heads]
        if tower
        else [model.model.language_model, model.model.multi_modal_projector, model.lm_head]
    )
    opts = optimizers(trained, lr)
    start = 0
    if (WORK / f"{stage}.pt").exists():
        loaded = torch.load(WORK / f"{stage}.pt", weights_only=True)
        model.load_state_dict(loaded["model"])
        heads.load_state_dict(loaded["heads"])
        for opt, state in zip(opts, loaded["opts"], strict=True):
            opt.load_state_dict(state)
        start = loaded["step"]
    packer = Packer(processor)
    if stage == "align" and start == 0:
        start_alignment(model, packer)
    began = time.time()
    for step in range(start, steps):
        # One generator per step, so that a resumed run sees the same images.
        rng = np.random.default_rng([{"tower": 1, "decoder": 2, "full": 3, "cls": 4, "align": 5}[stage], step])
        torch.manual_seed(step)
        set_rate(opts, step, steps, {"decoder": 0.0, "full": 0.8, "align": 0.8}.get(stage, 0.4))
        limit = 2 if step < max_digits_from else scenes.MAX_DIGITS
        batch = [scenes.compose(rng, "train", max_digits=limit) for _ in range(batch_size)]
        facts: dict[str, float]
        if tower:
            loss, facts = tower_step(model, heads, batch, stage == "cls")
        else:
            asked = []
            for scene in batch:
                *pool, count = scenes.questions(scene)
                # Places are learned last and slowest, so every question about one is asked.
                places = [question for question in pool if question.kind == "where"]
                others = [question for question in pool if question.kind != "where"]
                picked = [others[i] for i in rng.permutation(len(others))[:3]]
                # Counting needs every digit, so it is the first kind of answer to suffer.
                counts = [count] * (3 if stage == "align" else 1)
                asked.append([*places, *picked, *counts, *scenes.descriptions(scene)])
            # With steps on all tokens only, the model would unlearn to work with few.
            seen = int(rng.integers(10, 60)) if stage == "align" and step % 16 == 15 else visible
            loss, right, target = decoder_loss(model, packer, batch, asked, seen, stage == "align")
            content = target != tokenizer.eos_token_id
            facts = {"loss": loss.item(), "token_acc": right[content].float().mean().item()}
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if step % 20 == 0:
            line = {"step": step, "s": round(time.time() - began, 1), **{k: round(v, 4) for k, v in facts.items()}}
            print(json.dumps(line), flush=True)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save(stage, step + 1, model, heads, opts)


def export(stage: str) -> None:
    """Write the checkpoint as transformers would: config, fp16 safetensors, tokenizer, processor."""
    tokenizer = build_tokenizer()
    model: Any = LlavaForConditionalGeneration(build_config(tokenizer))
    model.load_state_dict(torch.load(WORK / f"{stage}.pt", weights_only=True)["model"])
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.half().save_pretrained(HERE)
    # Rename to the names in llava-hf's checkpoints, which every version of transformers reads.
    weights = load_file(HERE / "model.safetensors")
    old, new = "vision_tower.", "vision_tower.vision_model."
    renamed = {
        new + name.removeprefix(old) if name.startswith(old) and not name.startswith(new) else name: tensor
        for name, tensor in weights.items()
    }
    save_file(renamed, HERE / "model.safetensors", metadata={"format": "pt"})
    build_processor(tokenizer).save_pretrained(HERE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["tower", "cls", "decoder", "full", "align", "export"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--from-stage", default="align", help="which stage's weights `export` writes")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.stage == "export":
        export(arguments.from_stage)
    elif arguments.stage == "tower":
        train("tower", arguments.steps or 2200, 64, 0.02, TOKENS, 0)
    elif arguments.stage == "cls":
        train("cls", arguments.steps or 750, 64, 0.008, TOKENS, 0)
    elif arguments.stage == "decoder":
        train("decoder", arguments.steps or 1200, 32, 0.02, 40, 100)
    elif arguments.stage == "full":
        train("full", arguments.steps or 100, 32, 0.012, TOKENS, 0)
    else:
        train("align", arguments.steps or 320, 32, 0.008, TOKENS, 0)


if __name__ == "__main__":
    main()
