from .arrays import InputError as InputError
