"""A tripwire, nothing else: there are no decorators in here.

Another distribution, ``ratelimit`` 2.2.1, installs a package of the same name. Installed after this one it overwrites
``ratelimit/__init__.py``, whose first import is then ``ratelimit.decorators``; a package goes before a module of the
same name, so that the import ends here, with a clear word, instead of in a puzzle later on.
"""

raise ImportError(
    "the distribution 'ratelimit' has overwritten the modules of 'ratelimit-redis', which have the same import name;"
    " run: pip uninstall ratelimit && pip install --force-reinstall ratelimit-redis"
)
