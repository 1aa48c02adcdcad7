package web_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// The page's third-party code is exactly what was published, in the version that testdata/clients
// pins. So a new version needs a change in package.json and a copy.
func TestVendor_isWhatItsPackageHas(t *testing.T) {
	t.Parallel()
	at, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{
		"marked.js": "marked/lib/marked.esm.js", "marked.LICENSE": "marked/LICENSE",
		"purify.js": "dompurify/dist/purify.es.mjs", "purify.LICENSE": "dompurify/LICENSE",
	}
	for ours, theirs := range files {
		have, err := os.ReadFile(filepath.Join("vendor", ours))
		if err != nil {
			t.Error(err)
		}
		want, err := os.ReadFile(filepath.Join(at, "node_modules", theirs))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(have, want) {
			t.Errorf("vendor/%s is not %s", ours, theirs)
		}
	}
	if have, err := os.ReadDir("vendor"); err != nil || len(have) != len(files) {
		t.Errorf("vendor has %d files, not %d (%v)", len(have), len(files), err)
	}
}
