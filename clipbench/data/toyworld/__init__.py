"""toyworld: rendered rooms with everything known exactly, written in the layouts of the real data sets.

    scene = make_scene(seed=1, index=0)
    sample = render(scene, size=128)

See docs/toyworld.md.
"""

from clipbench.data.toyworld.facts import exact
from clipbench.data.toyworld.render import Sample, SampleObject, render
from clipbench.data.toyworld.scene import Scene, make_scene

__all__ = ["Sample", "SampleObject", "Scene", "exact", "make_scene", "render"]
