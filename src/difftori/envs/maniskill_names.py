"""Names of ManiSkill that the environment, the bridge to ManiSkill 2 and the reader of its files share."""

CONTROL = "pd_ee_delta_pose"
"""Control mode of the environments: a change of the hand's pose."""
CABINETS = ("OpenCabinetDrawer", "OpenCabinetDoor")
"""The tasks that need assets of PartNet-Mobility."""
ROBOTS = {
    "PickCube": "panda",
    "PushCube": "panda",
    "StackCube": "panda_wristcam",
    "PegInsertionSide": "panda_wristcam",
    **dict.fromkeys(CABINETS, "fetch"),
}
"""For each task of ManiSkill 3, its robot: the default of ManiSkill 3.0.1. `panda_wristcam` has a camera at the hand."""
_MOBILE = "base_pd_joint_vel_arm_pd_joint_vel"  # that of the published demonstrations, which cannot be converted
MANISKILL2 = {
    "PushChair": ("PushChair-v1", _MOBILE),
    "MoveBucket": ("MoveBucket-v1", _MOBILE),
    "Fill": ("Fill-v0", CONTROL),
    "Hang": ("Hang-v0", CONTROL),
    "Excavate": ("Excavate-v0", CONTROL),
    "Pour": ("Pour-v0", CONTROL),
}
"""For each task of ManiSkill 2, its name in Gymnasium's registry and its control mode."""
