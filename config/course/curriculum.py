# Curriculum (arXiv 2108.02170): from short examples to long ones, in four stages, or all of them in random order. The
# shortest quarter of the demonstrations asks for short words; whether meeting those first helps is what is asked here.
# python sft.py config/wordplay/sft.py config/course/curriculum.py --out_dir=out/random
# python sft.py config/wordplay/sft.py config/course/curriculum.py --curriculum=short_to_long --out_dir=out/short_to_long
# python configurator.py out/random out/short_to_long --metrics=response_loss,exact_match
#
# Needs out/bytes, of config/wordplay/base.py.
# Result after 400 steps: at random 0.827 of held-out prompts right greedily, 0.476 by sampling, response loss 0.151; from short to
# long 0.745, 0.403 and 0.209, but 0.27 of the sums, which are short, in place of 0.06. The short half of the run teaches little
# about long words: here the curriculum does not pay. Two minutes each on one core of the 2-core CPU with AVX-512.

max_iters = 400
eval_interval = 100
test_draws = 1
