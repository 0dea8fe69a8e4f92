"""The words that the command line knows. Nothing is imported here, so that help and errors of usage come at once."""

PACKAGES = ("brax", "gymnax")
POLICIES = ("linear", "mlp", "gru")
TASKS = ("completion", "classification", "similarity")
TRAINED = ("full", "bitfit", "lora", "prefix")
METRICS = ("loss", "accuracy", "f1")
SCHEDULES = ("constant", "linear", "cosine")
UPDATES = ("stochastic", "masters", "nearest")
TRAJECTORY = "model.trajectory"  # a fine-tuning writes it into its run folder
STATUS = {"interrupted": 130, "terminated": 143}  # exit statuses after Ctrl-C and SIGTERM, as in a shell
LANGUAGE = (  # strategies made for fine-tuning
    "comparison_descent", "fzoo", "gradient", "hizoo", "lozo", "lozo_m", "mezo", "mezo_adam", "mezo_momentum",
    "mezo_svrg", "one_point", "sparse_mezo", "spsa", "subzero", "zo_adamm", "zo_adamu", "zo_conservative",
    "zo_sign_sgd",
)  # fmt: skip
