class Plan:
    pass


def make_plan():
    pass
