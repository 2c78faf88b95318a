"""The data sets that are known by name: those of the paper, and some that are easy to have.

Hub ids, label columns and prompts of the first four are those of the paper's classifier (SPEC: Diff-C, data
and prompt modes); numbers of images are the sets' official ones. FGVC-Aircraft's label is ``variant``, one
of three levels. Caltech-101 has no official split: the hub's trains on 30 images a class and tests on the
rest, and a folder's is what its list files say.
"""

from revelio.data.sources import archives
from revelio.data.spec import DatasetSpec

FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# In the order of the class numbers in imagelabels.mat.
_FLOWERS = """
pink primrose; hard-leaved pocket orchid; canterbury bells; sweet pea; english marigold; tiger lily;
moon orchid; bird of paradise; monkshood; globe thistle; snapdragon; colt's foot; king protea;
spear thistle; yellow iris; globe-flower; purple coneflower; peruvian lily; balloon flower;
giant white arum lily; fire lily; pincushion flower; fritillary; red ginger; grape hyacinth;
corn poppy; prince of wales feathers; stemless gentian; artichoke; sweet william; carnation;
garden phlox; love in the mist; mexican aster; alpine sea holly; ruby-lipped cattleya; cape flower;
great masterwort; siam tulip; lenten rose; barbeton daisy; daffodil; sword lily; poinsettia;
bolero deep blue; wallflower; marigold; buttercup; oxeye daisy; common dandelion; petunia;
wild pansy; primula; sunflower; pelargonium; bishop of llandaff; gaura; geranium; orange dahlia;
pink-yellow dahlia; cautleya spicata; japanese anemone; black-eyed susan; silverbush;
californian poppy; osteospermum; spring crocus; bearded iris; windflower; tree poppy; gazania;
azalea; water lily; rose; thorn apple; morning glory; passion flower; lotus; toad lily; anthurium;
frangipani; clematis; hibiscus; columbine; desert-rose; tree mallow; magnolia; cyclamen;
watercress; canna lily; hippeastrum; bee balm; ball moss; foxglove; bougainvillea; camellia;
mallow; mexican petunia; bromelia; blanket flower; trumpet creeper; blackberry lily
"""
FLOWER_CLASSES = tuple(name.strip() for name in _FLOWERS.replace("\n", " ").split(";"))
_SPOKEN_CLOTHES = {name: name.lower() for name in FASHION_CLASSES} | {
    "T-shirt/top": "t-shirt or top",
    "Trouser": "pair of trousers",
}
_SPOKEN_CALTECH = {
    "BACKGROUND_Google": "background",
    "background_google": "background",
    "Faces": "face",
    "faces": "face",
    "Faces_easy": "face up close",
    "faces_easy": "face up close",
    "Leopards": "leopard",
    "leopards": "leopard",
    "Motorbikes": "motorbike",
    "motorbikes": "motorbike",
    "airplanes": "airplane",
    "car_side": "car from the side",
    "scissors": "pair of scissors",
    "water_lilly": "water lily",
    "yin_yang": "yin and yang symbol",
}

BUILTIN = (
    DatasetSpec(
        name="samples",
        title="the sample that comes with Revelio, from Fashion-MNIST",
        hub=None,
        template="A photo of a {}, a piece of clothing.",
        generic="A photo of a piece of clothing",
        classes=FASHION_CLASSES,
        spoken=_SPOKEN_CLOTHES,
    ),
    DatasetSpec(
        name="oxford-iiit-pet",
        title="Oxford-IIIT Pet",
        hub="timm/oxford-iiit-pet",
        template="A photo of a {}, a type of pet.",
        generic="A photo of a pet",
        split_sizes={"train": 3680, "test": 3669},
        layouts=(archives.oxford_pet,),
        expects="images/ beside annotations/, class folders, a saved data set or parquet files",
    ),
    DatasetSpec(
        name="caltech101",
        title="Caltech-101",
        hub="dpdl-benchmark/caltech101",
        template="A photo of a {}, an object.",
        generic="A photo of an object",
        split_sizes={"train": 3059, "test": 6085},
        spoken=_SPOKEN_CALTECH,
        expects="images/<class>/ beside train.txt and test.txt, class folders, a saved data set or "
        "parquet files",
    ),
    DatasetSpec(
        name="fgvc-aircraft",
        title="FGVC-Aircraft",
        hub="dpdl-benchmark/fgvc_aircraft",
        template="A photo of a {}, an aircraft.",
        generic="A photo of an aircraft",
        split_sizes={"train": 3334, "validation": 3333, "test": 3333},
        label_columns=("variant",),
        layouts=(archives.fgvc_aircraft,),
        expects="data/ with images/ and images_variant_train.txt, class folders, a saved data set or "
        "parquet files",
    ),
    DatasetSpec(
        name="dtd",
        title="Describable Textures",
        hub="dpdl-benchmark/dtd",
        template="A photo of a {}, a texture.",
        generic="A photo of a texture",
        split_sizes={"train": 1880, "validation": 1880, "test": 1880},
        layouts=(archives.dtd,),
        expects="images/<class>/ beside labels/, class folders, a saved data set or parquet files",
    ),
    DatasetSpec(
        name="flowers102",
        title="Oxford Flowers-102",
        hub="dpdl-benchmark/oxford_flowers102",
        template="A photo of a {}, a type of flower.",
        generic="A photo of a flower",
        split_sizes={"train": 1020, "validation": 1020, "test": 6149},
        classes=FLOWER_CLASSES,
        layouts=(archives.flowers,),
        expects="jpg/ beside imagelabels.mat and setid.mat, class folders, a saved data set or parquet "
        "files",
    ),
    DatasetSpec(
        name="fashion-mnist",
        title="Fashion-MNIST",
        hub="zalando-datasets/fashion_mnist",
        template="A photo of a {}, a piece of clothing.",
        generic="A photo of a piece of clothing",
        split_sizes={"train": 60000, "test": 10000},
        classes=FASHION_CLASSES,
        spoken=_SPOKEN_CLOTHES,
        expects="a folder of idx files (train-images-idx3-ubyte.gz, ...), a saved data set or parquet "
        "files",
    ),
    DatasetSpec(
        name="cifar10",
        title="CIFAR-10",
        hub="uoft-cs/cifar10",
        template="A photo of a {}.",
        generic="A photo",
        split_sizes={"train": 50000, "test": 10000},
        image_columns=("image", "img"),
        classes=CIFAR10_CLASSES,
    ),
)
