"""A run for one card, phase 1: 326 M parameters, 6.4 B tokens, in Lucie's shape.

config/pretrain.py scaled down by four rules, each named where it applies:
- width: a quarter of Lucie's hidden_size, half of its blocks; heads of 128 as there, so the 7B's
  kernels and rotary angles are the ones that run
- compute: 1.25e19 FLOPs, a 10,000th of Lucie's 1.31e23. With the exponents of DeepSeek LLM
  (arXiv:2401.02954, section 3.1: rate ~ C^-0.125, batch ~ C^0.327) Lucie's own learning rate
  becomes 3.2 times as large and its batch a 21st
- length: about 20 tokens a parameter (Hoffmann et al. 2022, arXiv:2203.15556)
- share: what Lucie did after so many per cent of its samples comes after as many here

    python -m data.prepare mixture data/mixtures/small.csv --out out/small_data
    python train.py config/small_pretrain.py

Memory, speed and hours: python -m bench.plan config/small_pretrain.py --card rtx4090,h100
"""

name = "small_pretrain"
init_from = "auto"  # goes on where it stopped
seed = 42

vocab_size = 65024  # Lucie's tokenizer; embedding and head are 133 M of the 326 M parameters
hidden_size = 1024  # width: a quarter
intermediate_size = 3072  # 3 times, as in Lucie
num_hidden_layers = 16  # half
num_attention_heads = 8  # of 128, as in Lucie
num_key_value_heads = 2  # each shared by 4 query heads, as in Lucie
initializer_range = 0.018  # Lucie's rule, sqrt(1 / (3 * hidden_size))

tokenizer = "out/small_data/tokenizer.json"  # Lucie's, saved beside the data
mixture = "out/small_data/pretraining.csv"  # Lucie's shares of about 100 public sources
validation = "out/small_data/validation.csv"  # held out, one stream a language
seq_len = 4096  # as in Lucie
rope_theta = 500_000.0  # as in Lucie: it depends on the length, not on the width

samples = 1_562_500  # length: 6.4 B tokens, 19.6 a parameter; 24,728 steps
global_batch_size = 64  # compute: 1,024 / 16, the power of two near 21; 262 k tokens
batch_ramp_start = 16  # 256 / 16
batch_ramp_increment = 4  # 64 / 16: 12 stairs
batch_ramp_samples = 20_500  # share: 1.3 %
learning_rate = 1e-3  # compute: 3.2 times 3e-4
min_learning_rate = 1e-4  # a tenth, as in Lucie
warmup_samples = 4_100  # share: 0.26 %, 222 steps
lr_decay = "cosine"  # over all samples, as in Lucie

beta1 = 0.9  # the optimizer is Lucie's
beta2 = 0.95
eps = 1e-5
weight_decay = 0.1
clip_grad = 1.0
dtype = "bfloat16"  # of compute

micro_batch_size = 4  # 14.6 GB at the peak of a step, for a card of 24; 16 on one of 48 or more
save_every = 250  # half an hour of one RTX 4090 at an MFU of 40 %
keep_last = 2  # 3.9 GB each, as all checkpoints: weights and two moments in fp32

log_every = 10  # 2,473 rows
eval_every = 250  # with the rolling checkpoints: 99 points of the curve
eval_samples = 256  # a million tokens, for half a dozen languages; 0.5 % of the time
sample_every = 250  # steps between completions of:
sample_prompts = (
    "La capitale de la France est\nThe three primary colours are\nEs war einmal\ndef fibonacci(n):"
)
checkpoint_every = 2_500  # 10 in all, 39 GB: the points of the curves of benchmarks
