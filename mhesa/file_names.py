"""The names of the files in a model's folder, and in that of a run, which becomes one."""

from mhesa import remote_code

OF_MODEL = CONFIG, GENERATION_CONFIG, WEIGHTS = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
)
OF_TOKENIZER = TOKENIZER_CONFIG, TOKENIZER, CHAT_TEMPLATE = (
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
)
OF_RUN = SETTINGS, METRICS, CURVE, CHECKPOINTS, TENSORBOARD = (
    "settings.json",
    "metrics.jsonl",
    "loss.png",
    "checkpoints",
    "tensorboard",
)
# Files that `mhesa train` writes into its folder. They are not read as text if a source contains that folder.
RUN_FILES = (*OF_RUN, *OF_MODEL, *OF_TOKENIZER, remote_code.FILE)
