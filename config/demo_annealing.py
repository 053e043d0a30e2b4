"""The demo, phase 3: the best data, here questions and answers, while the rate falls to zero."""

name = "demo_annealing"
init_from = "out/demo_extension"

hidden_size = 256
intermediate_size = 768
num_hidden_layers = 3
num_attention_heads = 8
num_key_value_heads = 2
vocab_size = 4096

tokenizer = "out/demo_data/ranks.tiktoken"
mixture = "out/demo_data/annealing.csv"
validation = "out/demo_data/validation.csv"
seq_len = 256
rope_theta = 400_000.0

samples = 2_000  # 0.51 M tokens
global_batch_size = 4
learning_rate = 1.5e-3  # high for its phase: what it teaches is mostly new
min_learning_rate = 0.0
warmup_samples = 0
lr_decay = "linear"
beta2 = 0.99
eps = 1e-8

micro_batch_size = 4
log_every = 5
eval_every = 50
eval_samples = 32
checkpoint_every = 0
checkpoint_prefix = "annealing_"
