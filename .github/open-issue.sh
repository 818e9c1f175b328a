#!/usr/bin/env bash
# open-issue.sh TITLE BODY.md: open an issue, or comment on the open one of that title. Needs `gh` with its GH_TOKEN.
set -euo pipefail
export TITLE=$1
body=$(mktemp)
head -c 60000 "$2" > "$body" # GitHub takes 65,536 characters

number=$(gh issue list --state open --limit 100 --search "in:title \"$TITLE\"" --json number,title \
  --jq 'map(select(.title == env.TITLE)) | .[0].number // empty')
if [ -n "$number" ]; then
  gh issue comment "$number" --body-file "$body"
else
  gh issue create --title "$TITLE" --body-file "$body"
fi
