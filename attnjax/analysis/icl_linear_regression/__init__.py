# SPDX-License-Identifier: Apache-2.0
"""In-context linear regression: what one layer of softmax attention learns, and why.

He, Pan, Chen and Yang, arXiv 2503.12734: `circuits` of trained heads, `theory` of their dynamics,
`predictors` they come close to, their `risk` on fresh prompts; `measures` are the reports of all
four. The network is `models.regression_attention`, its data `data.regression`.
"""
