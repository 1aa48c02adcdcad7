// Package web holds the page and the JavaScript client, as they are served. gapless.js is the
// client, for any page. gapless.d.ts is generated from it (types_test.go).
//
// There is no build step: a browser gets the files of this folder. The page works under a
// Content-Security-Policy that allows only files and connections of its own origin. So it contains
// no inline script and no inline style.
package web

import "embed"

// Files contains the page: index.html, for "/", and the files next to it that it names ("/app.js",
// "/style.css", ...), admin.html, for "/admin", and 404.html, for every path that does not exist. docs contains the API reference, for "/docs": Swagger UI as published (npm
// swagger-ui-dist), with its large files compressed, and a script that starts it; and the frame, style and script of the guide, for "/docs/guide". vendor contains
// third-party code of the page, as published (npm marked, dompurify).
//
//go:embed index.html admin.html 404.html app.js admin.js bounded.js gapless.js gapless.d.ts markdown.js naive.js plot.js style.css favicon.svg vendor/*.js docs
var Files embed.FS
