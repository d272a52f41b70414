"""One file per op: the public function, its plain-torch oracle (`*_ref`), registration, fake and gradient."""
