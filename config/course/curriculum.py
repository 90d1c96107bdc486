# Curriculum (arXiv 2108.02170): from short examples to long ones, in four stages, or all of them in random order. The
# shortest quarter of the demonstrations asks for short words; whether meeting those first helps is what is asked here.
# python sft.py config/wordplay/sft.py config/course/curriculum.py --out_dir=out/random
# python sft.py config/wordplay/sft.py config/course/curriculum.py --curriculum=short_to_long --out_dir=out/short_to_long
# python configurator.py out/random out/short_to_long --metrics=response_loss,exact_match
#
# Needs out/bytes, of config/wordplay/base.py.
# Result after 400 steps: at random 0.923 of held-out prompts right greedily, 0.567 by sampling, response loss 0.108; from short to
# long 0.734, 0.381 and 0.227. The short half of the run teaches little about long words: here the curriculum does
# not pay. 3 to 4 minutes each on one core.

max_iters = 400
eval_interval = 100
test_draws = 1
