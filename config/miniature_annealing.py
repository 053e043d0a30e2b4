"""The miniature, phase 3: the rate falls to zero."""

name = "miniature_annealing"
init_from = "out/miniature_extension"

hidden_size = 128
intermediate_size = 384
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 2
vocab_size = 1024

tokenizer = "out/miniature_data/ranks.tiktoken"
mixture = "out/miniature_data/train_long.csv"
validation = "out/miniature_data/valid_long.csv"
seq_len = 512
rope_theta = 400_000.0  # 40 times, as Lucie's

samples = 1_000  # 0.5 M tokens
global_batch_size = 4
learning_rate = 5e-4
min_learning_rate = 0.0
warmup_samples = 0
lr_decay = "linear"
eps = 1e-8

micro_batch_size = 4
log_every = 25
eval_every = 100
eval_samples = 32
checkpoint_every = 0
