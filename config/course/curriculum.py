# A curriculum: short prompts first (arXiv 2405.07490), short examples first (arXiv 2108.02170), or a
# random order. Four stages; the last one, of all examples, begins after 40% of the run.
#
#     for c in none short_prompts short_examples; do
#         for s in 1 2 3; do
#             python sft.py config/wordplay/sft.py config/course/curriculum.py --curriculum=$c \
#                 --seed=$s --out_dir=out/$c-$s
#         done
#     done
#
# It needs out/bytes, made with config/wordplay/base.py.
#
# Result after 400 steps, on held-out prompts, for the length of examples, with one seed and squared
# ReLU in the MLP; to be measured again:
#
#                                      random order   short examples
#     greedy exact match                      0.827           0.745
#     sampled exact match                     0.476           0.403
#     response loss, nats per token           0.151           0.209
#     greedy exact match of additions          0.06            0.27
#
# The curriculum does not help here: the first half of the run teaches little about long words. Only
# additions, which are short, are learned sooner. Two minutes per run on one core of a 2-core CPU
# with AVX-512.

max_iters = 400
eval_interval = 100
test_draws = 1
