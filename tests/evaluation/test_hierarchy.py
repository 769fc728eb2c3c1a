"""Measures on trees, against hand counts and networkx."""

import json
import random
from importlib import resources

import networkx as nx
import pytest
from rich.console import Console
from small_models import meru

from meru_fast.demo.pictures import DIGIT_NAMES
from meru_fast.evaluation.hierarchy import HierarchicalClassification, Hierarchy, hierarchical_metrics
from meru_fast.evaluation.output import Result, print_table
from meru_fast.evaluation.protocol import DatasetError, protocols

#       thing
#      /     \
#   animal   plant
#   /    \      \
#  dog   cat    oak
SMALL = {"animal": "thing", "plant": "thing", "dog": "animal", "cat": "animal", "oak": "plant"}


def test_a_right_prediction_scores_best():
    found = hierarchical_metrics(Hierarchy(SMALL), ["dog", "oak"], ["dog", "oak"])
    assert found == {"tie": 0, "lca": 1, "jaccard": 1, "hierarchical_precision": 1, "hierarchical_recall": 1}


def test_wrong_predictions_by_hand():
    tree = Hierarchy(SMALL)
    # A(cat) = A(dog) = {animal, thing}: a sibling shares all ancestors
    near = {"tie": 2, "lca": 1, "jaccard": 1, "hierarchical_precision": 1, "hierarchical_recall": 1}
    assert hierarchical_metrics(tree, ["cat"], ["dog"]) == near
    # A(oak) = {plant, thing}: one of two shared, three in the union
    far = {"tie": 4, "lca": 2, "jaccard": 1 / 3, "hierarchical_precision": 0.5, "hierarchical_recall": 0.5}
    assert hierarchical_metrics(tree, ["oak"], ["dog"]) == pytest.approx(far)
    # A(animal) = {thing}, so precision and recall differ
    above = {"tie": 1, "lca": 1, "jaccard": 0.5, "hierarchical_precision": 1, "hierarchical_recall": 0.5}
    assert hierarchical_metrics(tree, ["animal"], ["dog"]) == pytest.approx(above)
    mean = hierarchical_metrics(tree, ["cat", "oak"], ["dog", "dog"])
    assert mean == pytest.approx({name: (near[name] + far[name]) / 2 for name in near})


def test_a_root_has_no_ancestors_to_share():
    tree = Hierarchy(SMALL)
    assert hierarchical_metrics(tree, ["thing"], ["thing"])["jaccard"] == 1
    wrong = hierarchical_metrics(tree, ["thing"], ["dog"])
    assert (wrong["jaccard"], wrong["hierarchical_precision"], wrong["hierarchical_recall"]) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_graphs_with_several_parents_agree_with_networkx(seed):
    chosen = random.Random(seed)
    names = [f"n{number}" for number in range(60)]
    parents = {
        name: chosen.sample(names[:number], k=min(number, chosen.randint(1, 3)))
        for number, name in enumerate(names)
        if number
    }
    tree = Hierarchy(parents)
    graph = nx.DiGraph((above, child) for child, several in parents.items() for above in several)
    undirected = graph.to_undirected()
    for first, second in zip(chosen.choices(names, k=40), chosen.choices(names, k=40), strict=True):
        assert tree.distance(first, second) == nx.shortest_path_length(undirected, first, second)
        assert tree.ancestors(first) == nx.ancestors(graph, first)


def test_errors_name_the_concept():
    tree = Hierarchy(SMALL | {"stone": "mineral"})
    with pytest.raises(ValueError, match="not in the tree: wolf"):
        hierarchical_metrics(tree, ["wolf"], ["dog"])
    with pytest.raises(ValueError, match="no path between 'stone' and 'dog'"):
        hierarchical_metrics(tree, ["stone"], ["dog"])
    with pytest.raises(ValueError, match="got 1 and 2"):
        hierarchical_metrics(tree, ["dog"], ["dog", "cat"])
    with pytest.raises(ValueError, match=r"cycle: 'a'"):
        Hierarchy({"a": "b", "b": "c", "c": "a", "d": "a", "e": "f"})
    with pytest.raises(ValueError, match="cycle"):
        Hierarchy({"a": "a"})


def test_files(tmp_path):
    (tmp_path / "tree.json").write_text(json.dumps(SMALL | {"dog": ["animal", "plant"]}))
    assert Hierarchy.load(tmp_path / "tree.json").ancestors("dog") == {"animal", "plant", "thing"}
    (tmp_path / "wordnet.is_a.txt").write_text("thing animal\nanimal dog\n\nanimal cat\n")
    assert Hierarchy.load(tmp_path / "wordnet.is_a.txt").distance("dog", "cat") == 2
    (tmp_path / "bad.txt").write_text("thing animal\nanimal\n")
    with pytest.raises(ValueError, match=r"bad.txt: line 2 is not \"parent child\""):
        Hierarchy.load(tmp_path / "bad.txt")
    (tmp_path / "bad.json").write_text('["dog"]')
    with pytest.raises(ValueError, match=r"bad.json: expected a JSON object"):
        Hierarchy.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"no shipped tree of that name \(.*cifar100"):
        Hierarchy.load("cifar1000")


def test_the_shipped_tree_holds_every_class_of_cifar100():
    tree = Hierarchy.load("cifar100")
    classes = protocols()["cifar100"].class_names
    assert all(name in tree for name in classes)
    assert tree.distance("maple tree", "oak tree") == 2
    assert {"animal", "living thing", "thing"} <= tree.ancestors("trout")
    assert len({frozenset(tree.parents[name]) for name in classes}) == 20


def test_the_shipped_tree_of_imagenet_is_wordnets():
    tree = Hierarchy.load("imagenet")
    labels = (resources.files("timm") / "data" / "_info" / "imagenet_synsets.txt").read_text().split()
    assert len(labels) == 1000
    assert tree.leaves == labels  # in label order, so that label i is concept i
    chihuahua, tabby, entity = "n02085620", "n02123045", "n00001740"
    assert labels.index(chihuahua) == 151
    assert protocols()["imagenet"].class_names[151] == "Chihuahua"
    assert all(entity in tree.ancestors(label) for label in labels)
    # toy dog, dog, canine | domestic animal, carnivore, placental, mammal, vertebrate, chordate, animal, ...
    assert {"n02085374", "n02084071", "n02083346", "n01317541", "n02075296", "n00015388"} <= tree.ancestors(chihuahua)
    # Chihuahua - toy dog - dog - domestic animal - domestic cat - tabby
    assert tree.distance(chihuahua, tabby) == 5


def test_concepts_of_classes(tmp_path):
    (tmp_path / "tree.json").write_text(json.dumps(SMALL))
    dataset = {"name": "pets", "kind": "folder", "root": str(tmp_path), "prompts": ["{}"]}

    def concepts(nodes):
        evaluator = HierarchicalClassification([dataset], trees={"pets": str(tmp_path / "tree.json")}, nodes=nodes)
        return evaluator._concepts("pets", ["a", "b"])

    assert concepts(None) == ["a", "b"]
    assert concepts({"pets": ["dog", "cat"]}) == ["dog", "cat"]
    assert concepts({"pets": "leaves"}) == ["cat", "dog", "oak"]
    with pytest.raises(ValueError, match=r"evaluator\.nodes of pets.*got 'leafs'"):
        concepts({"pets": "leafs"})


def test_the_table_scales_shares_and_leaves_counts(capsys):
    metrics = hierarchical_metrics(Hierarchy(SMALL), ["oak", "dog"], ["dog", "dog"])
    print_table([Result("digits", "MERU", "a.pth", "hierarchical_classification", metrics)], Console(width=100))
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-2].split("│")]
    assert cells[1:8] == ["a.pth", "digits", "2.000", "1.500", "66.7", "75.0", "75.0"]


def test_the_evaluator_scores_folders_of_images(demo_data):
    model = meru()
    dataset = {"name": "digits", "kind": "folder", "root": str(demo_data / "digits"), "prompts": ["a handwritten {}"]}
    tree = demo_data.parent / "digits.json"
    tree.write_text(json.dumps({name: "even" if i % 2 == 0 else "odd" for i, name in enumerate(DIGIT_NAMES)}))
    with pytest.raises(ValueError, match="no tree for digits"):
        HierarchicalClassification([dataset], trees={}, image_size=32)
    apart = HierarchicalClassification([dataset], trees={"digits": str(tree)}, image_size=32)
    with pytest.raises(DatasetError, match="digits: no path between"):
        apart(model)  # even and odd digits have no common ancestor
    tree.write_text(json.dumps(json.loads(tree.read_text()) | {"even": "digit", "odd": "digit"}))
    found = HierarchicalClassification([dataset], trees={"digits": str(tree)}, image_size=32)(model)
    # every digit has two ancestors: "digit", always shared, and its parity, shared when the guess has the same one
    same = 2 - found["digits/lca"]
    assert 0 <= same <= 1
    assert found["digits/hierarchical_precision"] == pytest.approx((1 + same) / 2)
    assert found["digits/jaccard"] == pytest.approx(same + (1 - same) / 3)
    assert 2 * (1 - same) <= found["digits/tie"] <= 4
