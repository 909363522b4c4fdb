"""The autoencoder: encoder, bottleneck, decoder, and the masks of kept tokens."""

from elastic.model.autoencoder import Batch, ElasticTok, init_params, param_shapes
from elastic.model.bottleneck import make_bottleneck

__all__ = ["Batch", "ElasticTok", "init_params", "make_bottleneck", "param_shapes"]
