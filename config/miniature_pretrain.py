"""The miniature, phase 1: so small a model, on so short sequences, learns to look back on a CPU.

`make miniature` runs it after `python -m data.passages` has made its data.
"""

name = "miniature_pretrain"

hidden_size = 128
intermediate_size = 384
num_hidden_layers = 2  # one head finds the place, one in the next layer reads what follows
num_attention_heads = 2
num_key_value_heads = 2
vocab_size = 1024
initializer_range = 0.02

tokenizer = "out/miniature_data/ranks.tiktoken"
mixture = "out/miniature_data/train_short.csv"
validation = "out/miniature_data/valid_short.csv"
seq_len = 128
rope_theta = 10_000.0

samples = 56_000  # 7 M tokens
global_batch_size = 8
learning_rate = 1e-3
min_learning_rate = 1e-4
warmup_samples = 1_600
lr_decay = "cosine"
eps = 1e-8

micro_batch_size = 8
log_every = 100
eval_every = 200
eval_samples = 64
checkpoint_every = 0
