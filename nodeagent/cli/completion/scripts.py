"""The scripts for bash, zsh and fish. Each asks `nodeagent __complete WORD…` what the last word could become: a
candidate a line, a tab and what it means. Exit code 1 leaves it to the shell, which completes names of files.
"""

from __future__ import annotations

BASH = """\
# bash completion for nodeagent
_nodeagent() {
    local line=${COMP_LINE:0:COMP_POINT} found current
    local -a words
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    current=${words[${#words[@]} - 1]}
    COMPREPLY=()
    if ! found=$("${words[0]}" __complete "${words[@]:1}" 2> /dev/null); then
        compopt -o default 2> /dev/null
        return
    fi
    [[ -n $found ]] || return
    mapfile -t COMPREPLY <<< "$found"
    COMPREPLY=("${COMPREPLY[@]%%$'\\t'*}")
    # bash replaces only what follows the last of COMP_WORDBREAKS, such as a colon
    COMPREPLY=("${COMPREPLY[@]#"${current%"${current##*[$COMP_WORDBREAKS]}"}"}")
}
complete -F _nodeagent nodeagent
"""
ZSH = """\
#compdef nodeagent
# zsh completion for nodeagent
_nodeagent() {
    local found line
    local -a candidates
    if ! found=$("${words[1]}" __complete "${(@)words[2,CURRENT]}" 2> /dev/null); then
        _files
        return
    fi
    for line in "${(@f)found}"; do
        [[ -n $line ]] && candidates+=("${${line%%$'\\t'*}//:/\\\\:}:${line#*$'\\t'}")
    done
    _describe nodeagent candidates
}
if [[ ${funcstack[1]} == _nodeagent ]]; then
    _nodeagent "$@"
else
    compdef _nodeagent nodeagent
fi
"""
FISH = """\
# fish completion for nodeagent
function __nodeagent_complete
    set -l typed (commandline -opc)
    set -l current (commandline -ct)
    set -l found ($typed[1] __complete $typed[2..-1] "$current" 2> /dev/null)
    if test $status -ne 0
        __fish_complete_path "$current"
    else
        printf '%s\\n' $found
    end
end
complete -c nodeagent -f -a '(__nodeagent_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
