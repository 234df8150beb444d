"""OPT as a Hugging Face model.

`OPTModel.from_pretrained(folder)` loads it, and so does `AutoModel.from_pretrained` after importing this module.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from opt_ds.config import config_from_dict
from opt_ds.data.batch import EncoderInputs
from opt_ds.errors import UserError
from opt_ds.model.opt import OPT
from opt_ds.serving.exported import check_exported
from opt_ds.serving.processor import OPTProcessor
from opt_ds.serving.session import Session
from opt_ds.store.processor_files import PROCESSOR_FOLDER
from opt_ds.training.checkpoint import HUB_MODEL_TYPE


class OmniPerceptionConfig(PretrainedConfig):
    """Configuration that holds the run's complete configuration in `opt_ds_config`.

    It is the dump of an `opt_ds.config.Config`.

    The name avoids a conflict with transformers' OPTConfig, which is for Meta's OPT.
    """

    model_type = HUB_MODEL_TYPE

    def __init__(self, opt_ds_config: dict[str, Any] | None = None, **others: Any) -> None:
        self.opt_ds_config = opt_ds_config or {}
        super().__init__(**others)


_WORD = "opt.embeddings.text.word.weight"


class OPTModel(PreTrainedModel):
    """The pre-trained network.

    `forward` returns the encoder's packed output; `session` reads raw files and generates.
    """

    config_class = OmniPerceptionConfig
    base_model_prefix = "opt_ds"

    def __init__(self, config: OmniPerceptionConfig, opt: OPT | None = None) -> None:
        super().__init__(config)
        settings = config_from_dict(config.opt_ds_config, where="config.json")
        self.opt = opt or OPT(settings.model, settings.tasks)
        # The word embedding is one tensor with several names.
        named = dict(self.named_parameters(remove_duplicate=False))
        self._tied_weights_keys = {
            name: _WORD for name, parameter in named.items() if parameter is named[_WORD] and name != _WORD
        }
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> "OPTModel":
        """Load an exported folder of this machine, after `opt_ds.serving.exported.check_exported`.

        No network is used.

        Args:
            pretrained_model_name_or_path: The folder.
            *arguments: As for transformers' `PreTrainedModel.from_pretrained`.
            **options: As for transformers' `PreTrainedModel.from_pretrained`.

        Returns:
            The model.

        Raises:
            UserError: The folder is missing, damaged or not an exported model.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no exported model there (no config.json): give a folder that opt-ds export wrote")
        check_exported(folder)
        return super().from_pretrained(folder, *arguments, **{**options, "local_files_only": True})

    def forward(self, inputs: EncoderInputs) -> torch.Tensor:
        """Return hidden_te [packed positions, width] of packed inputs with any mixture of modalities."""
        return self.opt.encode(inputs)

    def session(self, folder: str | Path, **options: Any) -> Session:
        """Return this model as a Session with the processor in its folder. The options are those of `OPTProcessor`."""
        settings = config_from_dict(self.config.opt_ds_config, where="config.json")
        return Session(self.opt, settings, OPTProcessor(Path(folder) / PROCESSOR_FOLDER, settings.model, **options), self.device)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Do nothing: OPT initialises itself."""


AutoConfig.register(HUB_MODEL_TYPE, OmniPerceptionConfig)
AutoModel.register(OmniPerceptionConfig, OPTModel)
