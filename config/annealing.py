"""Phase 3, annealing: 5 B tokens of the best sources while the learning rate falls to zero.

From the weights of phase 2, with a fresh optimizer at step 0. Lucie: 128 H100, 1,220 steps; the end
of this phase is the released Lucie-7B.

    torchrun --nproc-per-node=8 train.py config/annealing.py --init_from=out/extension
"""

name = "annealing"
init_from = "out/extension"  # its newest checkpoint, weights only
seed = 42

# architecture: Lucie-7B's, the defaults of config/__init__.py, but for theta
mixture = "data/mixtures/annealing.csv"  # 14 sources: mathematics, science, Wikipedia, dialogue
seq_len = 32_000
rope_theta = 20_000_000.0  # 40 times that of phase 1

samples = 156_250  # 1,220 steps
global_batch_size = 128  # 4.1 M tokens
learning_rate = 3e-5  # where the cosine of phase 1 ended
min_learning_rate = 0.0
warmup_samples = 0  # none
lr_decay = "linear"

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
checkpoint_every = 0  # only the end
