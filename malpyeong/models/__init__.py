"""Models, tokenizers and adapters: loading them, the memory they need, the packages they need."""
