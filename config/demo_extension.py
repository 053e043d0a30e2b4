"""The demo, phase 2: twice as long sequences and a larger theta, at a constant rate."""

name = "demo_extension"
init_from = "out/demo_pretrain"

hidden_size = 256
intermediate_size = 768
num_hidden_layers = 6
num_attention_heads = 4
num_key_value_heads = 1
vocab_size = 4096

tokenizer = "out/demo_data/ranks.tiktoken"
mixture = "out/demo_data/extension.csv"
validation = "out/demo_data/validation.csv"
seq_len = 512
rope_theta = 40_000.0

samples = 160  # 82 k tokens
global_batch_size = 4
learning_rate = 3e-4  # where the cosine of phase 1 ended
min_learning_rate = 3e-4
warmup_samples = 0
lr_decay = "constant"
eps = 1e-8

micro_batch_size = 4
log_every = 2
eval_every = 10
eval_samples = 16
checkpoint_every = 0
checkpoint_prefix = "extension_"
