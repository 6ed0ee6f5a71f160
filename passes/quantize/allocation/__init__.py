"""Which weight gets how many bits: sensitivities that are measured, and the best choice for them.

The linearity theorem: errors of weights that are small and as good as random raise the loss by the
sum of what each weight alone does to it, in proportion to its squared relative error. So
`sensitivity` measures one slope per weight, `choose` picks formats under a budget by dynamic
programming, and `quantize_to_budget` is the pass.

Source: Malinovskii et al. 2024, "Pushing the Limits of Large Language Model Quantization via the
Linearity Theorem" (arXiv 2411.17525), sections 3 and 5.
"""
