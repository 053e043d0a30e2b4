"""A run for one card, phase 2: sequences of 32,000 tokens, from the weights of phase 1.

config/extension.py with the model, the batch and the learning rate of config/small_pretrain.py: as
many steps as Lucie made, each of a 16th of its tokens.

    python train.py config/small_extension.py
"""

name = "small_extension"
init_from = "out/small_pretrain"  # its newest checkpoint, weights only
seed = 42

vocab_size = 65024  # the model is that of phase 1
hidden_size = 1024
intermediate_size = 3072
num_hidden_layers = 16
num_attention_heads = 8
num_key_value_heads = 2
initializer_range = 0.018

tokenizer = "out/small_data/tokenizer.json"
mixture = "out/small_data/extension.csv"  # long documents ten times as often, as in Lucie
validation = "out/small_data/validation.csv"
seq_len = 32_000  # as in Lucie
rope_theta = 20_000_000.0  # as in Lucie: 40 times that of phase 1

samples = 9_760  # 1,220 steps, as in Lucie; 0.31 B tokens
global_batch_size = 8  # 128 / 16; one for each of eight cards
learning_rate = 6.7e-5  # a 15th of phase 1's, as in Lucie
min_learning_rate = 6.7e-5
warmup_samples = 0
lr_decay = "constant"

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
eval_every = 250  # with the checkpoints
eval_samples = 32  # a million tokens
checkpoint_every = 250  # as in Lucie
checkpoint_prefix = "extension_"
