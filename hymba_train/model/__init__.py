"""What Hymba is, as Megatron-Core modules."""

from hymba_train.model.build import build_model_chunks
from hymba_train.model.config import HymbaConfig, hymba_config
from hymba_train.model.model import HymbaModel

__all__ = ["HymbaConfig", "HymbaModel", "build_model_chunks", "hymba_config"]
