"""minitf: a mini transformer trainer whose attention you can see."""
