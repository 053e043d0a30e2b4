"""The demo, phase 1: the shape of config/pretrain.py at a size for two CPU cores.

4.4 M parameters, a vocabulary of 4,096, half a million tokens: batch ramp, warm-up, cosine.
`make demo` runs it after `python -m data.demo` has made its data. docs/results.md says what
the choices marked * rest on.
"""

name = "demo_pretrain"

hidden_size = 256
intermediate_size = 768  # 3 times, as in Lucie
num_hidden_layers = 3
num_attention_heads = 8  # * of 32; our attention kernels take 64 and 128, so a GPU uses torch's
num_key_value_heads = 2  # a quarter, as in Lucie
vocab_size = 4096
initializer_range = 0.05  # * 0.8 / sqrt(hidden_size); Lucie's 0.009 is 0.6 / sqrt(4096)

tokenizer = "out/demo_data/ranks.tiktoken"
mixture = "out/demo_data/pretraining.csv"
validation = "out/demo_data/validation.csv"
seq_len = 64  # * some five questions and answers
rope_theta = 10_000.0

samples = 8_000  # 0.51 M tokens
global_batch_size = 16  # * 1,024 tokens: many small steps
batch_ramp_samples = 400
batch_ramp_start = 8
batch_ramp_increment = 4
learning_rate = 2e-3
min_learning_rate = 2e-4
warmup_samples = 800
lr_decay = "cosine"
beta2 = 0.99  # * longer than Lucie's 0.95, for gradients of a thousand tokens are noisy
eps = 1e-8

micro_batch_size = 16
log_every = 5
eval_every = 100
eval_samples = 128
checkpoint_early_every = 50
checkpoint_early_steps = 100
checkpoint_every = 150
