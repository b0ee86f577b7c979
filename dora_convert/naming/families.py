"""Hold every table about model families: module names, layouts and class names that differ.

Data only: functions that use a table live where the question arises. Families are named by `model_type`.
"""

from __future__ import annotations

RENAMED = frozenset(
    {
        "mixtral", "minimax", "minimax_m2", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2",
        "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "olmoe", "flex_olmo",
        "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "exaone_moe", "cohere2_moe", "longcat_flash",
        "solar_open", "afmoe", "qwen3_omni_moe", "qwen3_5_moe", "jamba", "nemotron_h", "lfm2_moe",
        "granitemoe", "granitemoeshared", "granitemoehybrid", "qwen3_vl_moe", "qwen2_vl", "qwen2_5_vl",
        "qwen2_5_omni", "llava", "llava_next", "llava_next_video", "llava_onevision", "gemma3", "mistral3",
        "paligemma", "internvl", "aya_vision", "aria", "got_ocr2", "vipllava", "mllama", "fuyu",
        "video_llava", "emu3", "gemma3n", "gemma3n_text", "qwen3_5_text", "gpt_neox",
    }
)  # fmt: skip
"""Families whose tensors may have other names on disk than in the running model (transformers 5)."""

PAST_LORA = {
    "jamba": ("mamba.dt_proj",),
    "longcat_flash": ("router.classifier",),
    "siglip": ("head.attention.out_proj",),
    "siglip_vision_model": ("head.attention.out_proj",),
    "siglip2": ("head.attention.out_proj",),
    "siglip2_vision_model": ("head.attention.out_proj",),
}
"""Layers whose weight a family's forward pass reads itself, so that an adapter on them has no effect in training."""

# Embeddings and heads

EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings"})
"""Last names of input embeddings."""
TABLES = ("wpe", "relative_attention_bias", "position_embeddings", "token_type_embeddings")
"""Last names of the other embeddings."""
HEADS = ("lm_head", "embed_out", "proj_out", "cls.predictions.decoder", "lm_head.decoder", "vocab_projector")
"""Last names of output heads that may be tied to the input embedding."""
OTHER_HEADS = {
    "bert": "cls.predictions.decoder", "roberta": "lm_head.decoder", "xlm-roberta": "lm_head.decoder",
    "camembert": "lm_head.decoder", "distilbert": "vocab_projector", "whisper": "proj_out",
}  # fmt: skip
"""The head's name in families that do not call their head `lm_head`."""
HEAD_TOPS = frozenset({"lm_head", "cls", "vocab_transform", "vocab_layer_norm", "generator_predictions"})
"""First names of the layers around a language model's head, which models with another head do not have."""
SCALED = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct"})
"""Families that compute differently with a tied head, so that untying the head changes more than weights."""
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
TURNED_EXPERTS = frozenset({"gpt_oss", "openai_privacy_filter", "aria"})
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
