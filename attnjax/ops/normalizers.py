# SPDX-License-Identifier: Apache-2.0
"""All normalizers by name.

Names without parameters can be given to `attention` as they are; the others name their class:

    attention(q, k, v, normalizer="softmax_one")
    attention(q, k, v, normalizer=normalizers.SinkLogit(logits))

The numbers are those of "Attention Sink in Transformers: A Survey", arXiv 2604.10098, section A.

    name              no.  weights                                      parameters
    softmax            1   e^z / sum e^z
    softmax_one        2   e^z / (1 + sum e^z)
    sink_logit         3   e^z / (e^logit + sum e^z)                    logits [n]
    kv_bias            4   softmax with a key and value in front        key, value [n|k|1, h]
    k_bias             5   the same with value 0                        key [n|k|1, h]
    v_bias             6   softmax, output + value                      value [n|k|1, hv]
    ca_bias            7   softmax, output + share . value              key, value [n|k|1, h]
    clipped            8   clip((zeta - gamma) softmax + gamma, 0, 1)   gamma, zeta
    softpick           9   relu(e^z - 1) / (sum |e^z - 1| + eps)
    softpick_survey    9   relu(softmax - threshold)                    threshold
    elastic           10   relu(softmax + tau / visible keys)           tau [n]
    elastic_survey    10   softmax(z / temperature)                     temperature
    sigmoid           11   sigmoid(z), optionally / (sum + eps)
    elu1              12   elu(z) + 1, optionally / (sum + eps)
    kernel            13   z / max(|sum z|, 1), z = phi(q) . phi(k)     `kernel_features`
    grouped            -   landmarks gate their blocks (arXiv 2305.16300)   is_landmark [b|1, s]

The mean of sampled scores (14) is softmax of what `integral` returns.
"""

from attnjax.ops.elementwise import (
    FEATURES,
    Clipped,
    Elastic,
    ElasticSurvey,
    Elu1,
    Kernel,
    Sigmoid,
    Softpick,
    SoftpickSurvey,
    integral,
    kernel_features,
)
from attnjax.ops.grouped import Grouped
from attnjax.ops.normalizer import Elementwise, Normalizer, Rowwise, SoftmaxFamily
from attnjax.ops.softmax_family import (
    ContextBias,
    KeyBias,
    KeyValueBias,
    SinkLogit,
    SoftmaxOne,
    ValueBias,
)

__all__ = [
    "FEATURES",
    "NORMALIZERS",
    "Clipped",
    "ContextBias",
    "Elastic",
    "ElasticSurvey",
    "Elementwise",
    "Elu1",
    "Grouped",
    "Kernel",
    "KeyBias",
    "KeyValueBias",
    "Normalizer",
    "Rowwise",
    "Sigmoid",
    "SinkLogit",
    "SoftmaxFamily",
    "SoftmaxOne",
    "Softpick",
    "SoftpickSurvey",
    "ValueBias",
    "integral",
    "kernel_features",
]

NORMALIZERS = {
    "softmax": SoftmaxFamily,
    "softmax_one": SoftmaxOne,
    "sink_logit": SinkLogit,
    "kv_bias": KeyValueBias,
    "k_bias": KeyBias,
    "v_bias": ValueBias,
    "ca_bias": ContextBias,
    "clipped": Clipped,
    "softpick": Softpick,
    "softpick_survey": SoftpickSurvey,
    "elastic": Elastic,
    "elastic_survey": ElasticSurvey,
    "sigmoid": Sigmoid,
    "elu1": Elu1,
    "kernel": Kernel,
    "grouped": Grouped,
}
"""Name -> class; those without parameters can be given to `attention` by name."""
