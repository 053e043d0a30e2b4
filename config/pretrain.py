"""Phase 1, main pretraining: 3.12 T tokens in sequences of 4,096, from scratch.

Lucie: 512 H100, 753,851 steps, 486,654 GPU hours, April to September 2024. What is not set here is
Lucie-7B's architecture and optimizer, the defaults of config/__init__.py.

    torchrun --nproc-per-node=8 train.py config/pretrain.py
"""

name = "pretrain"
init_from = "auto"
seed = 42

mixture = "data/mixtures/pretraining.csv"  # 140 sources, weights summing to 1
seq_len = 4096
rope_theta = 500_000.0

samples = 762_144_586  # 753,851 steps; the step that would pass it is not made
global_batch_size = 1024  # 4.2 M tokens, reached after the ramp:
batch_ramp_start = 256
batch_ramp_increment = 64  # 12 stairs
batch_ramp_samples = 10_000_000
learning_rate = 3e-4
min_learning_rate = 3e-5
warmup_samples = 2_000_000  # ends at step 7,402
lr_decay = "cosine"  # over all samples

beta1 = 0.9
beta2 = 0.95
eps = 1e-5
weight_decay = 0.1
clip_grad = 1.0
initializer_range = 0.009
dtype = "bfloat16"

micro_batch_size = 1
max_minutes = 1190.0  # jobs of 20 hours

checkpoint_early_every = 5_000  # step0005000 ... step0025000,
checkpoint_early_steps = 25_000
checkpoint_every = 25_000  # step0050000 ... step0750000, and the last, step0753851
