"""Models behind a server with OpenAI's chat completions: trtllm-serve, vLLM, TensorRT Edge-LLM, transformers serve.

    address.py    URLs, names that can be shown, the key
    client.py     bytes there and back: time limits, caps, cancelling
    dialects.py   what each kind of server wants to be told, and what it says
    images.py     images as data URLs
    discovery.py  who is there, and what it can do
    servers.py    which server is asked: health, fail-over, what there is to complain about
    asking.py     one question to one server
    frame.py      the questions of a frame to one server: concurrency, repeats, limits of time
    backend.py    the questions of a frame: order, fail-over
    engine.py     puts them together
"""
