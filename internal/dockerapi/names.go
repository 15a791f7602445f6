package dockerapi

import (
	"math/rand/v2"
	"strconv"
)

// nameTries is how often a random name may be taken before the ID serves as one.
const nameTries = 8

// randomName makes a name for a container that the user gave none: two words, from the
// second try on with a digit.
func randomName(try int) string {
	adjectives := [...]string{
		"able", "amber", "ample", "ancient", "apt", "azure", "bold", "brave", "breezy", "bright",
		"brisk", "calm", "candid", "cheerful", "clear", "clever", "coastal", "copper", "coral", "crisp",
		"curious", "daring", "deft", "distant", "eager", "early", "elegant", "fair", "faithful", "fearless",
		"festive", "fine", "firm", "fleet", "fluent", "fond", "frank", "free", "fresh", "gentle",
		"gilded", "glad", "golden", "graceful", "grand", "hardy", "hearty", "honest", "humble", "indigo",
		"jolly", "keen", "kind", "lively", "loyal", "lucid", "lunar", "mellow", "merry", "mighty",
		"modest", "nimble", "noble", "northern", "patient", "placid", "polite", "proud", "quick", "quiet",
		"rapid", "ready", "robust", "rosy", "royal", "salty", "serene", "sharp", "silent", "silver",
		"sincere", "smooth", "snug", "solar", "sound", "southern", "spry", "stable", "steady", "stellar",
		"sturdy", "sunny", "swift", "tidal", "tidy", "tranquil", "true", "upbeat", "valiant", "vivid",
	}
	nouns := [...]string{
		"anchor", "albatross", "ballast", "barge", "beacon", "bollard", "bow", "breeze", "bridge", "brig",
		"bulkhead", "buoy", "cabin", "cable", "canal", "capstan", "caravel", "catamaran", "channel", "clipper",
		"cockle", "compass", "coracle", "corvette", "crane", "crew", "current", "cutter", "davit", "deck",
		"delta", "derrick", "dinghy", "dock", "dolphin", "estuary", "ferry", "fjord", "fleet", "foghorn",
		"frigate", "galleon", "galley", "gannet", "gull", "halyard", "harbour", "hatch", "haven", "helm",
		"heron", "hull", "islet", "jetty", "junk", "kayak", "keel", "ketch", "knot", "lagoon",
		"lantern", "lateen", "launch", "levee", "lighthouse", "lock", "lugger", "marina", "mast", "mooring",
		"narwhal", "oar", "pennant", "petrel", "pier", "pilot", "pinnace", "plover", "porpoise", "port",
		"prow", "quay", "raft", "reef", "rigging", "rudder", "sail", "schooner", "seal", "sextant",
		"shoal", "skiff", "sloop", "spar", "starboard", "tern", "tide", "tiller", "trawler", "wharf",
	}
	name := adjectives[rand.IntN(len(adjectives))] + "_" + nouns[rand.IntN(len(nouns))]
	if try > 0 {
		name += strconv.Itoa(rand.IntN(10))
	}
	return name
}
