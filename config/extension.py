"""Phase 2, context extension: 5 B tokens in sequences of 32,000, from the weights of phase 1.

The base of the rotary embedding grows from 500,000 to 20,000,000, so that angles turn slowly
enough to tell 32,000 positions apart. The optimizer starts afresh, at step 0. Lucie: 128 H100,
1,220 steps.

    torchrun --nproc-per-node=8 train.py config/extension.py --init_from=out/pretrain
"""

name = "extension"
init_from = "out/pretrain"  # its newest checkpoint, weights only
seed = 42

# architecture: Lucie-7B's, the defaults of config/__init__.py, but for theta
mixture = "data/mixtures/extension.csv"  # long documents ten times as often as short ones
seq_len = 32_000
rope_theta = 20_000_000.0  # 40 times that of phase 1

samples = 156_250  # 1,220 steps
global_batch_size = 128  # 4.1 M tokens
learning_rate = 2e-5  # near where the cosine of phase 1 ended
min_learning_rate = 2e-5
warmup_samples = 0  # none
lr_decay = "constant"

beta1 = 0.9  # the optimizer is that of phase 1
beta2 = 0.95
eps = 1e-5
weight_decay = 0.1
clip_grad = 1.0
dtype = "bfloat16"  # of compute

micro_batch_size = 1
activation_checkpointing = "full"  # 32,000 tokens would else take more than a card holds
max_minutes = 1190.0  # jobs of 20 hours
save_every = 50  # half an hour at Lucie's own speed
keep_last = 2

eval_every = 250  # with the checkpoints
checkpoint_every = 250  # extension_step0000250 ... and the last, extension_step0001220
checkpoint_prefix = "extension_"
