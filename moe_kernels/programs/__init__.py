"""Programs behind the console command ``moe-kernels``; :mod:`.commands` lists them.

They use the library as anyone would, and the library uses nothing of theirs.
"""
