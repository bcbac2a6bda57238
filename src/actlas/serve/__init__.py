"""Serve: an OpenAI-compatible server in which every request may carry its own edits, and a web page.

    actlas serve smollm2 --edit happy=vec/ --edit brief=brief.gguf

`requests.py` says what a request may hold, `engine.py` runs requests in batches, `app.py` is the HTTP
part. Edits are loaded when the server starts; a request names them and their strengths and can never name
a file.
"""
