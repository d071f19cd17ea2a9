"""nanomath: DeepSeekMath (arXiv:2402.03300) from web pages to a policy trained by GRPO."""
