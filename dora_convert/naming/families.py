"""Hold every table about model families: module names, layouts and class names that differ.

Data only: functions that use a table live where the question arises. Families are named by `model_type`.
"""

from __future__ import annotations

from collections.abc import Mapping

PAST_LORA = {
    "jamba": ("mamba.dt_proj",),
    "longcat_flash": ("router.classifier",),
    "mobilebert": ("cls.predictions.decoder", "cls.predictions.dense"),
    "siglip": ("head.attention.out_proj",),
    "siglip_vision_model": ("head.attention.out_proj",),
    "siglip2": ("head.attention.out_proj",),
    "siglip2_vision_model": ("head.attention.out_proj",),
}
"""Layers whose weight a family's forward pass reads itself, so that an adapter on them has no effect in training."""

# Embeddings and heads

EMBEDDINGS = frozenset(
    {
        "embed_tokens", "wte", "word_embeddings", "word_embedding", "shared", "embed_in", "tok_embeddings",
        "tokens_embed", "embeddings",
    }
)  # fmt: skip
"""Last names of input embeddings."""
TABLES = ("wpe", "relative_attention_bias", "position_embeddings", "token_type_embeddings")
"""Last names of the other embeddings."""
HEADS = (
    "lm_head", "embed_out", "proj_out", "predictions.decoder", "lm_head.decoder", "vocab_projector",
    "generator_lm_head", "output_projection", "pred_layer.proj", "lm_head.out_proj", "head.decoder", "lm_loss",
)  # fmt: skip
"""Last names of output heads that may be tied to the input embedding."""
COMPOSITE = frozenset({"encoder-decoder", "speech-encoder-decoder", "vision-encoder-decoder"})
"""Families made of two models, whose head is the one in `decoder`."""
HEADS_OF: Mapping[str, frozenset[str]] = {
    "text_decoder.cls.predictions.decoder": frozenset({"blip"}),
    "cls.predictions.decoder": frozenset(
        {
            "bert", "big_bird", "deberta", "deberta-v2", "ernie", "fnet", "layoutlm", "lxmert", "megatron-bert",
            "mobilebert", "mra", "nomic_bert", "nystromformer", "rembert", "roc_bert", "roformer", "squeezebert",
            "tapas", "visual_bert", "yoso",
        }
    ),
    "lm_head.decoder": frozenset(
        {
            "bert-generation", "camembert", "data2vec-text", "esm", "esmc", "gte", "ibert", "jina_embeddings_v3",
            "longformer", "luke", "mpnet", "reformer", "roberta", "roberta-prelayernorm", "xlm-roberta",
            "xlm-roberta-xl", "xmod",
        }
    ),
    "proj_out": frozenset({"canary", "cohere_asr", "moonshine", "moonshine_streaming", "whisper"}),
    "language_model.lm_head": frozenset({"blip-2", "instructblip", "instructblipvideo", "llama4"}),
    "text_model.lm_head": frozenset({"kosmos-2", "kosmos-2.5"}),
    "text_decoder_postnet.lm_head": frozenset({"speecht5"}),
    "decoder.lm_head": frozenset({"pix2struct"}),
    "predictions.decoder": frozenset({"albert"}),
    "output_projection": frozenset({"biogpt", "trocr"}),
    "generator_lm_head": frozenset({"convbert", "electra"}),
    "vocab_projector": frozenset({"distilbert"}),
    "pred_layer.proj": frozenset({"flaubert", "xlm"}),
    "embed_out": frozenset({"gpt_neox_japanese"}),
    "lm_head.out_proj": frozenset({"t5gemma", "t5gemma2"}),
    "head.decoder": frozenset({"ultrabert"}),
    "lm_loss": frozenset({"xlnet"}),
    "decoder": frozenset({"modernbert", "modernbert-decoder"}),
    "output": frozenset({"git"}),
    "head": frozenset({"rwkv"}),
}  # fmt: skip
"""The families whose head in the running model has another name than `lm_head`."""
HEAD_TOPS = frozenset({"lm_head", "cls", "vocab_transform", "vocab_layer_norm", "generator_predictions"})
"""First names of the layers around a language model's head, which models with another head do not have."""
SCALED = frozenset(
    {
        "t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct", "t5gemma2", "prophetnet", "diffusion_gemma",
        "zamba", "zamba2", "luke",
    }
)  # fmt: skip
"""Families that compute differently with a tied head, or tie more than the head: untying it changes more weights."""
INNER = {
    "gpt2": "transformer.", "bloom": "transformer.", "falcon": "transformer.", "bert": "bert.",
    "roberta": "roberta.", "xlm-roberta": "roberta.", "distilbert": "distilbert.", "electra": "electra.",
    "camembert": "roberta.",
}  # fmt: skip
"""The prefix of the bare model's tensors inside a model with a head."""

# Layouts

LAYERS = r"(?P<before>.*?(?:layers|encoder\.layer|(?:^|\.)h)\.)(?P<number>\d+)(?P<after>\..*)"
"""A regular expression for tensors inside a stack of layers."""
COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
"""Config keys that hold the number of layers."""
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
"""Families and last names of transformers' Conv1D, whose weight is (in, out). Square shapes do not tell."""
TURNED_EXPERTS = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})
"""Families whose experts are (in, out) and say so (`is_transposed` in transformers)."""

EXPERT_LAYERS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Last names that PEFT turns into parameters of experts, or of a router, in models whose experts are a stack."""

# Classes of transformers, by the ends of their names

HEADLESS = ("Model", "Classification", "QuestionAnswering", "MultipleChoice", "Regression", "Detection")
"""Classes without an output head over the vocabulary."""
SUFFIXES = (
    "LMHeadModel", "DoubleHeadsModel", "ForCausalLM", "ForMaskedLM", "ForPreTraining",
    "ForConditionalGeneration", "ForSequenceClassification", "ForTokenClassification",
    "ForQuestionAnswering", "Model",
)  # fmt: skip
"""Every ending that may follow the family's name."""
PIPELINES = {
    "ForCausalLM": "text-generation", "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification", "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering", "ForMaskedLM": "fill-mask",
}  # fmt: skip
"""The Hub's pipeline tag of a class."""
LABEL_LAYERS = ("weight", "out_proj.weight")
"""Weights inside a classification head whose rows are labels."""
BEFORE_LABELS = "pre_classifier."
"""DistilBERT's layer before the layer whose rows are labels."""
