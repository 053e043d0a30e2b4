"""A run for one card, phase 3: the best data while the learning rate falls to zero.

config/annealing.py with the model, the batch and the learning rate of config/small_pretrain.py: as
many steps as Lucie made, each of a 16th of its tokens.

    python train.py config/small_annealing.py
"""

name = "small_annealing"
init_from = "out/small_extension"  # its newest checkpoint, weights only
seed = 42

vocab_size = 65024  # the model is that of phase 1
hidden_size = 1024
intermediate_size = 3072
num_hidden_layers = 16
num_attention_heads = 8
num_key_value_heads = 2
initializer_range = 0.018

tokenizer = "out/small_data/tokenizer.json"
mixture = "out/small_data/annealing.csv"  # Lucie's, without what is no plain text: docs/data.md
validation = "out/small_data/validation.csv"
seq_len = 32_000
rope_theta = 20_000_000.0

samples = 9_760  # 1,220 steps, as in Lucie; 0.31 B tokens
global_batch_size = 8
learning_rate = 1e-4  # where the cosine of phase 1 ended, as in Lucie
min_learning_rate = 0.0
warmup_samples = 0
lr_decay = "linear"

beta1 = 0.9  # the optimizer is that of phase 1
beta2 = 0.95
eps = 1e-5
weight_decay = 0.1
clip_grad = 1.0
dtype = "bfloat16"  # of compute

micro_batch_size = 1
activation_checkpointing = "selective"  # 17.4 GB, for a card of 24; none takes 22.6
save_every = 100  # half an hour of one RTX 4090 at an MFU of 40 %
keep_last = 2  # 3.9 GB each

log_every = 10  # 122 rows
eval_every = 250
eval_samples = 32  # a million tokens
sample_every = 250  # the prompts of phase 1
sample_prompts = (
    "La capitale de la France est\nThe three primary colours are\nEs war einmal\ndef fibonacci(n):"
)
checkpoint_every = 0  # only the end
