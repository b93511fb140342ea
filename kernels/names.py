"""What the kernels know of the language of row programs. A number stands for each name, in this order."""

INSTRUCTIONS = ("linear", "affine", "act", "norm", "save", "add")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "mish", "elu", "selu", "tanh", "sigmoid", "softplus")
