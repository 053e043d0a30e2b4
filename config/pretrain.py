"""Phase 1, main pretraining: 3.12 T tokens in sequences of 4,096, from scratch.

Lucie: 512 H100, 753,851 steps, 486,654 GPU hours, April to September 2024. What is not set here is
Lucie-7B's architecture and optimizer, the defaults of config/__init__.py.

    torchrun --nproc-per-node=8 train.py config/pretrain.py
"""

name = "pretrain"
init_from = "auto"  # goes on where an earlier job of this run stopped
seed = 42  # of initial weights and data order

vocab_size = 65024
hidden_size = 4096
intermediate_size = 12288  # 3 times
num_hidden_layers = 32
num_attention_heads = 32  # of 128
num_key_value_heads = 8  # each shared by 4 query heads
rms_norm_eps = 1e-5
initializer_range = 0.009  # about sqrt(1 / (3 * hidden_size))

mixture = "data/mixtures/pretraining.csv"  # 140 sources, weights summing to 1
seq_len = 4096
rope_theta = 500_000.0  # Llama 3's

samples = 762_144_586  # 753,851 steps; the step that would pass it is not made
global_batch_size = 1024  # 4.2 M tokens, reached after the ramp:
batch_ramp_start = 256
batch_ramp_increment = 64  # 12 stairs
batch_ramp_samples = 10_000_000
learning_rate = 3e-4  # at the end of the warm-up
min_learning_rate = 3e-5  # at the last sample
warmup_samples = 2_000_000  # ends in step 6,728
lr_decay = "cosine"  # over all samples

beta1 = 0.9
beta2 = 0.95  # a memory of about 20 steps for the squares
eps = 1e-5  # large, so that a parameter with hardly any gradient hardly moves
weight_decay = 0.1  # of matrices only
clip_grad = 1.0  # largest norm of the whole gradient
dtype = "bfloat16"  # of compute; weights, gradients and moments are fp32

parallel = "fsdp"  # 16 bytes a parameter, shared by all GPUs; hsdp where machines are far apart
micro_batch_size = 1  # raise it to what the memory holds: python -m bench.plan
activation_checkpointing = "none"
max_minutes = 1190.0  # Lucie ran in jobs of 20 hours
save_every = 500  # 40 minutes at Lucie's own speed: what a crash can cost at most
keep_last = 2

checkpoint_early_every = 5_000  # step0005000 ... step0025000,
checkpoint_early_steps = 25_000
checkpoint_every = 25_000  # step0050000 ... step0750000, and the last, step0753851
