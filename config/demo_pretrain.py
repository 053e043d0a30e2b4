"""The demo, phase 1: the shape of config/pretrain.py at a size for two CPU cores.

6.6 M parameters, a vocabulary of 4,096, about a million tokens: batch ramp, warm-up, cosine.
`make demo` runs it after `python -m data.prepare demo` has made its data.
"""

name = "demo_pretrain"

hidden_size = 256
intermediate_size = 768  # 3 times, as in Lucie
num_hidden_layers = 6
num_attention_heads = 4  # of 64
num_key_value_heads = 1  # a quarter, as in Lucie
vocab_size = 4096
initializer_range = 0.02

tokenizer = "out/demo_data/ranks.tiktoken"
mixture = "out/demo_data/pretraining.csv"
validation = "out/demo_data/validation.csv"
seq_len = 256
rope_theta = 10_000.0

samples = 3_300  # 0.84 M tokens
global_batch_size = 8
batch_ramp_samples = 200
batch_ramp_start = 4
batch_ramp_increment = 2
learning_rate = 3e-3
min_learning_rate = 3e-4
warmup_samples = 200
lr_decay = "cosine"
eps = 1e-8

micro_batch_size = 8
log_every = 5
eval_every = 50
eval_samples = 32
checkpoint_early_every = 50
checkpoint_early_steps = 100
checkpoint_every = 150
