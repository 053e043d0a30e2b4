"""The demo, phase 2: sequences 4 times as long, theta 40 times as large (8 and 40 in Lucie)."""

name = "demo_extension"
init_from = "out/demo_pretrain"

hidden_size = 256
intermediate_size = 768
num_hidden_layers = 3
num_attention_heads = 8
num_key_value_heads = 2
vocab_size = 4096

tokenizer = "out/demo_data/ranks.tiktoken"
mixture = "out/demo_data/extension.csv"
validation = "out/demo_data/validation.csv"
seq_len = 256
rope_theta = 400_000.0

samples = 160  # 41 k tokens
global_batch_size = 4
learning_rate = 2e-4  # constant, where the cosine of phase 1 ended
min_learning_rate = 2e-4
warmup_samples = 0
lr_decay = "constant"
beta2 = 0.99
eps = 1e-8

micro_batch_size = 4
log_every = 2
eval_every = 20
eval_samples = 32
checkpoint_every = 0
checkpoint_prefix = "extension_"
