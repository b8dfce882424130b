"""What the real model is asked: English, code, other scripts, chat."""

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a little girl who",
    "Water boils at 100 degrees, and it freezes at",
    "def fibonacci(n):\n",
    "for (int i = 0; i < 10; i++) {\n\tprintf(",
    "SELECT name, COUNT(*) FROM users WHERE",
    "1, 2, 3, 5, 8,",
    "Caf\u00e9 na\u00efve, \u4e2d\u6587 \U0001f642 and 12345 don't\n\n   x",
    "\u041c\u043e\u0441\u043a\u0432\u0430 \u2014 \u0441\u0442\u043e\u043b\u0438\u0446\u0430",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n"
    "<|im_start|>assistant\n",
)
